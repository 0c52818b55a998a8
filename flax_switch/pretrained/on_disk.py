"""Experts that stay in a checkpoint's files: `load_pretrained(..., experts="disk")`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Array

from flax_switch.config import SwitchConfig, check, one_of
from flax_switch.convert import checkpoint as checkpoints
from flax_switch.convert.canonical import canonical_shapes, is_expert
from flax_switch.convert.folder import parse_size
from flax_switch.convert.safetensors_file import identity, watched
from flax_switch.convert.tensors import DTYPES, CheckpointError, LazyTensor, contiguous, full_index
from flax_switch.host.expert_cache import READERS, Arrays, ExpertCache
from flax_switch.host.files import in_store
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.on_disk import OnDisk

PLACES = ("memory", "disk")
EXPERT_MEMORY = "4GB"
LARGE = 2**20  # bytes of an expert whose kernels are read at a time
_NARROW = (DTYPES["bfloat16"], DTYPES["float16"])
_STEMS = {"huggingface": "model", "flax_switch": "params"}

Files = Mapping[str, tuple[int, ...]]  # by path, what the file was when it was opened


def expert_budget(experts: str, expert_memory: str | int | None) -> int | None:
    """Returns the bytes that experts on disk may take in memory; None where all are in memory. Raises `ConfigError`."""
    one_of("experts", experts, PLACES)
    check(
        experts == "disk" or expert_memory is None,
        f"expert_memory={expert_memory!r} bounds the memory of experts on disk; with it goes experts='disk'.",
    )
    return parse_size(EXPERT_MEMORY if expert_memory is None else expert_memory) if experts == "disk" else None


def expert_files(opened: checkpoints.Checkpoint) -> Files:
    """Returns the files that experts can be read from, as they are now.

    Raises:
      CheckpointError: for a format of which an expert cannot be read by itself.
    """
    stem = "" if in_store(opened.path) else _STEMS.get(opened.format, "")
    if not any((opened.path / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json")):
        raise CheckpointError(
            f"{opened.path}: experts='disk' reads them from safetensors files in a local folder, and this has none. Convert it "
            "first: flax-switch convert SRC DST --to flax_switch."
        )
    return {str(path): identity(path.stat()) for path in opened.path.iterdir() if path.is_file()}


def leave_on_disk(
    config: SwitchConfig, architecture: str, tensors: Mapping[str, LazyTensor], files: Files, budget: int
) -> tuple[dict[str, LazyTensor], dict[str, OnDisk]]:
    """Returns the tensors that are to be loaded, and what stands for those of experts.

    Raises:
      ConfigError: where the budget does not hold an expert, or the model has none.
      CheckpointError: where experts are missing.
    """
    check(not config.scan_layers, "experts='disk' runs layers one by one; leave scan_layers=True out.")
    check(config.layer_form != "fused", "experts='disk' reads experts that are MLPs; those of fused layers are projections.")
    wanted = [path for path in canonical_shapes(config, architecture) if is_expert(path)]
    check(bool(wanted), "experts='disk' is for sparse models; this one has no experts. Leave it out.")
    missing = [path for path in wanted if path not in tensors]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing: experts that stay on disk must all be there. Leave out experts='disk'.")
    layers: dict[str, dict[str, LazyTensor]] = {}
    for path in wanted:
        layer, _, name = path.partition("/mlp/expert/")
        layers.setdefault(layer, {})[name] = tensors[path]
    parts = {layer: {name: (t.shape, t.dtype) for name, t in arrays.items()} for layer, arrays in layers.items()}

    def read(layer: str, expert: int) -> tuple[Arrays, int]:
        return _read(layers[layer], layer, expert, files)

    cache = ExpertCache(parts, read, budget)
    held = {f"{layer}/mlp/expert/{name}": OnDisk(cache, layer, name) for layer in layers for name in layers[layer]}
    return {path: tensor for path, tensor in tensors.items() if path not in held}, held


def narrow(arrays: Mapping[str, Array]) -> dict[str, Array | Narrow]:
    """Returns parameters of which kernels of 16 bits are widened only while they are multiplied."""
    fitting = lambda path, x: path.endswith("/kernel") and x.dtype in _NARROW and "/shared_expert/" not in path  # noqa: E731
    return {path: Narrow(x) if fitting(path, x) else x for path, x in arrays.items()}


def _read(tensors: Mapping[str, LazyTensor], layer: str, expert: int, files: Files) -> tuple[Arrays, int]:
    """Returns an expert's arrays and how many bytes were read. Raises `CheckpointError` that names the expert."""
    one = functools.partial(_one, files=files, expert=expert)
    size = sum(tensor.nbytes // tensor.shape[0] for tensor in tensors.values())
    names, parts = list(tensors), list(tensors.values())
    try:
        if size < LARGE:
            read = [one(part) for part in parts]
        else:  # two threads read, and transpose what has to be, sooner than one
            others = [_helpers().submit(one, part) for part in parts[1:]]
            read = [one(parts[0]), *(other.result() for other in others)]
        return dict(zip(names, (array for array, _ in read), strict=True)), sum(count for _, count in read)
    except (CheckpointError, OSError) as error:
        why = f"{Path(error.filename)}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        raise CheckpointError(f"Expert {expert} of {layer} cannot be read: {why.removesuffix('.')}.") from error


def _one(tensor: LazyTensor, *, files: Files, expert: int) -> tuple[np.ndarray, int]:
    """Returns one of an expert's arrays and how many bytes were read."""
    with watched(files) as watch:
        block = tensor.read((slice(expert, expert + 1), *full_index(tensor.shape[1:])))
        return contiguous(block[0]), watch.bytes


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Returns threads that read a part of an expert while its first part is read; they wait for nothing but files."""
    return ThreadPoolExecutor(READERS, "experts' kernels")
