"""Writes a T5X checkpoint folder the way T5X does: msgpack, and zarr folders beside it."""

from __future__ import annotations

from pathlib import Path

import flax.serialization
import numpy as np
import tensorstore

from flax_switch.convert.canonical import unflatten

INLINE_BYTES = 200  # smaller arrays stay in the msgpack file, as T5X keeps those it does not partition


def write(
    folder: Path,
    params: dict[str, np.ndarray],
    *,
    spec_form: str = "new",
    driver: str = "file",
    step: int = 10,
    inline: int = INLINE_BYTES,
) -> Path:
    """`folder/checkpoint_<step>`, with an optimiser's state beside the target."""
    checkpoint = folder / f"checkpoint_{step}"
    checkpoint.mkdir(parents=True)
    target = {}
    for path, array in params.items():
        if array.nbytes <= inline:
            target[path] = array
            continue
        name = f"target.{path.replace('/', '.')}"
        spec = write_zarr(checkpoint / name, array)
        where = f"/bucket/elsewhere/{checkpoint.name}/{name}/" if driver == "gfile" else name
        kvstore = {"driver": driver} | ({"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {})
        target[path] = {"driver": "zarr", "dtype": array.dtype.name, "kvstore": kvstore, "metadata": spec}
        (kvstore if spec_form == "new" else target[path])["path"] = where
    states = {path: {"v": np.zeros(3, np.float32)} for path in params}
    contents = {
        "version": 3,
        "optimizer": {"target": unflatten(target), "state": {"step": np.int32(step), "param_states": unflatten(states)}},
    }
    (checkpoint / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return checkpoint


def write_zarr(folder: Path, array: np.ndarray) -> dict:
    """Writes a zarr v2 array, gzipped, in chunks that do not fit the tensor; returns its metadata."""
    chunks = [max(1, size // 2 + 1) for size in array.shape]
    metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
    store = tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata},
        dtype=array.dtype.name, create=True,
    ).result()  # fmt: skip
    store.write(array).result()
    return metadata
