"""Tensorstore arrays (zarr, in folders or in Orbax's key-value store) as lazy tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_switch.convert.tensors import CheckpointError, Index, LazyTensor

# Room for a chunk that holds several experts, which would else be unpacked once for each of them.
CACHE_BYTES = 128 * 2**20


def open_array(spec: dict[str, Any], name: str) -> LazyTensor:
    """The array of a tensorstore spec; `name` is what errors call it."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    try:
        store = ts.open({**spec, "recheck_cached_data": "open"}, read=True, context=context).result()
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be opened: {error}") from error

    def read(index: Index) -> np.ndarray:
        try:
            return store[tuple(index)].read().result()
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error

    return LazyTensor(tuple(store.shape), store.dtype.numpy_dtype, read)
