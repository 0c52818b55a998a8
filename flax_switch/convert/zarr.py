"""Tensorstore arrays (zarr, in folders or in Orbax's key-value store) as lazy tensors."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.convert.tensors import CheckpointError, Index, LazyTensor
from flax_switch.host.files import in_store
from flax_switch.host.json_text import parse_json

MAX_CACHE_BYTES = 128 * 2**20


def key_value_store(folder: Path) -> str | dict[str, str]:
    """Returns the tensorstore spec of the files below a folder, on a disk or in object storage."""
    return f"{folder}/" if in_store(folder) else {"driver": "file", "path": f"{folder.resolve()}/"}


def open_array(spec: dict[str, Any], name: str) -> LazyTensor:
    """Returns the array of a tensorstore spec; `name` is what errors call it."""
    text = json.dumps(spec)
    try:
        store = _open(text, 0)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be opened: {error}") from error
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    rows = store.chunk_layout.read_chunk.shape[0] if shape else 1
    cache_bytes = min(MAX_CACHE_BYTES, math.prod(shape) * dtype.itemsize)

    def read(index: Index) -> np.ndarray:
        # A chunk may hold several experts of a stack, and would else be unpacked once for each of them.
        divides_chunks = bool(shape) and index[0].stop - index[0].start < min(rows, shape[0])
        try:
            return _open(text, cache_bytes if divides_chunks else 0)[tuple(index)].read().result()
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error

    return LazyTensor(shape, dtype, read)


@functools.lru_cache(maxsize=1)  # tensors are read one after the other: only the last one's chunks stay in memory
def _open(spec: str, cache_bytes: int) -> Any:
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return ts.open(
        {**parse_json(spec, "a store's description"), "recheck_cached_data": "open"}, read=True, context=context
    ).result()
