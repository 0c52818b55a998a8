"""T5X checkpoint folders: writing. `checkpoint_<step>/checkpoint` names zarr folders beside it, one for each parameter.

The form is that of T5X's own `checkpoints.Checkpointer`, version 3, for a model without an optimiser (`InferenceState`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig, check
from flax_switch.convert.canonical import unflatten
from flax_switch.convert.scan import stack_layers
from flax_switch.convert.tensors import BLOCK_BYTES, LazyTensor, contiguous

VERSION = 3
_T5X_FORM = {"norm": "rms", "use_bias": False, "embedding_scale": "head", "expert_masking_rate": 0.0}
_OF_ENCODER_DECODERS = {"positions": "relative", "scale_attention_logits": False}


def t5x_files(
    config: SwitchConfig, architecture: str, tensors: Mapping[str, LazyTensor], step: int
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, bytes]]:
    """Returns a checkpoint's zarr folders, each with its one tensor, and the file that names them; scanned as the config says.

    Raises:
      ConfigError: for what T5X does not save: a part of a model, a head of a task, or another form of layers.
    """
    check(
        architecture == "full",
        f"T5X's checkpoints hold whole models with a language model's head; this is one of the architecture {architecture!r}. "
        "Convert it to huggingface or flax_switch.",
    )
    for name, value in {**_T5X_FORM, **({} if config.decoder_only else _OF_ENCODER_DECODERS)}.items():
        found = getattr(config, name)
        check(
            found == value,
            f"{name}={found!r}: T5X's T5 has none of that, but {value!r}. Convert the model to flax_switch, or to huggingface.",
        )
    if config.scan_layers:
        tensors = stack_layers(tensors, config)
    import flax.serialization

    folder, shards, target = f"checkpoint_{step}", {}, {}
    for path, tensor in tensors.items():
        name = f"target.{path.replace('/', '.')}"
        shards[f"{folder}/{name}"] = {path: tensor}
        target[path] = _spec(tensor, name)
    contents = {"version": VERSION, "optimizer": {"target": unflatten(target), "state": {"step": np.int32(step)}}}
    return shards, {f"{folder}/checkpoint": flax.serialization.msgpack_serialize(contents)}


def write_zarr(folder: Path, shard: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> None:
    """Writes a shard's one tensor as a zarr array, block by block."""
    import tensorstore as ts

    (tensor,) = shard.values()
    spec = ts.Spec(_spec(tensor, str(folder.resolve())))
    store = ts.open(spec, create=True, delete_existing=True).result()
    start = 0
    for block in tensor.blocks():
        rows = block.shape[0] if block.ndim else 0
        place = store[start : start + rows] if block.ndim else store
        place.write(contiguous(block)).result()
        start += rows
        on_bytes(block.nbytes)


def step_of(folder: Path) -> int:
    """Returns the step that a checkpoint's folder is named by, in a run or as T5X names it; 0 for any other."""
    match = re.fullmatch(r"(?:checkpoint_)?(\d{1,9})", folder.name)
    return int(match[1]) if match else 0


def _spec(tensor: LazyTensor, path: str) -> dict[str, Any]:
    """Returns what tensorstore is told, and T5X's file says, about an array; stacks have the chunks that blocks fill."""
    chunks = list(tensor.shape)
    if len(chunks) > 2 and tensor.nbytes:
        chunks[0] = min(chunks[0], max(1, BLOCK_BYTES // (tensor.nbytes // chunks[0])))
    metadata = {"shape": list(tensor.shape), "chunks": chunks, "compressor": None}
    return {"driver": "zarr", "dtype": tensor.dtype.name, "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
