"""Torch's .bin files, read tensor by tensor and never unpickled beyond plain tensors (weights_only)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flax_switch.config import one_line
from flax_switch.convert.safetensors_file import read_block
from flax_switch.convert.tensors import DTYPES, CheckpointError, Index, LazyTensor, from_array
from flax_switch.host.files import in_store


def read_torch_bin(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a state dict, by name.

    torch tells where in the file each tensor lies, and blocks are then read from there; files of its old format, which does
    not say, are loaded whole.

    Raises:
      ImportError: without torch (the extra `torch`).
      CheckpointError: if the file is corrupt, or holds anything but tensors.
    """
    if in_store(path):
        raise CheckpointError(f"{path}: torch files are read from disks. Copy the folder to one, or use its safetensors.")
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ImportError(
            f"{path} is a torch file: reading it needs torch (pip install 'flax_switch[torch]'). Safetensors files need no torch."
        ) from error
    try:
        with FakeTensorMode():  # reads shapes and places, no contents
            state = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(state, dict) and any(_is_unplaced(tensor) for tensor in state.values()):
            state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # what torch and pickle raise for a damaged file is of many kinds
        raise CheckpointError(f"{path} is no readable state dict of tensors: {one_line(error)}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name")
    if any(_is_unplaced(tensor) for tensor in state.values()):
        return {name: from_array(_to_numpy(tensor)) for name, tensor in state.items()}
    return {name: _lazy(path, name, tensor, _file_offset(tensor) or 0) for name, tensor in state.items()}


def _is_unplaced(tensor) -> bool:
    """Returns whether torch does not say where in the file a tensor's bytes lie, one after another."""
    return not hasattr(tensor, "untyped_storage") or _file_offset(tensor) is None or not tensor.is_contiguous()


def _file_offset(tensor) -> int | None:
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return None if start is None else start + tensor.storage_offset() * tensor.element_size()


def _lazy(path: Path, name: str, tensor, offset: int) -> LazyTensor:
    dtype, shape = _dtype(path, name, tensor), tuple(tensor.shape)

    def read(index: Index) -> np.ndarray:
        return read_block(path, offset, shape, dtype, index)

    return LazyTensor(shape, dtype, read)


def _dtype(path: Path, name: str, tensor) -> np.dtype:
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {tensor.dtype}; known are {', '.join(DTYPES)}")
    return dtype


def _to_numpy(tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has none: the bits pass as integers
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.contiguous().numpy()
