"""Tensors that are read when asked for, so that a checkpoint of any size passes through a small memory.

A `LazyTensor` knows its shape and dtype and how to read a block of itself. Transposing, stacking and slicing give new lazy
tensors; nothing is read before `read`, and then no more than the block needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from flax_switch.config import ConfigError

Index = tuple[slice, ...]  # one slice an axis, with plain start and stop

BLOCK_BYTES = 32 * 2**20  # stacks are copied in blocks of about this size
_STRIP = 256  # columns of a matrix that are transposed at a time


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or written as asked: the message names the file and the tensor."""


DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def dtype_name(dtype: Any) -> str:
    """Returns the name of a dtype of numpy, jax or torch, or of what is one already; of what is none, how it is written."""
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor somewhere else: `read(index)` fetches a block, `index` holding one slice for each axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Returns the whole tensor."""
        return self.read(full_index(self.shape))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the tensor in order along its first axis: stacks (rank 3 and more) block by block, the rest in one piece."""
        if len(self.shape) < 3 or self.nbytes == 0:
            yield self.numpy()
            return
        rows = max(1, BLOCK_BYTES // (self.nbytes // self.shape[0]))
        rest = full_index(self.shape[1:])
        for start in range(0, self.shape[0], rows):
            yield self.read((slice(start, min(start + rows, self.shape[0])), *rest))


def full_index(shape: Sequence[int]) -> Index:
    """Returns the index of everything."""
    return tuple(slice(0, size) for size in shape)


def from_array(array: Any) -> LazyTensor:
    """Returns a numpy or jax array as a lazy tensor; a block of a jax array is copied to the host when it is read."""
    everything = full_index(array.shape)

    def read(index: Index) -> np.ndarray:
        return np.asarray(array if index == everything else array[index])

    return LazyTensor(tuple(array.shape), np.dtype(array.dtype), read)


def abstract(shape: Sequence[int], dtype: np.dtype = DTYPES["float32"]) -> LazyTensor:
    """Returns a tensor of which only the shape is known."""

    def unreadable(index: Index) -> np.ndarray:
        raise CheckpointError("this tensor has a shape but no contents")

    return LazyTensor(tuple(shape), dtype, unreadable)


def transpose(tensor: LazyTensor) -> LazyTensor:
    """Returns the tensor with its axes reversed."""
    return LazyTensor(tensor.shape[::-1], tensor.dtype, lambda index: tensor.read(index[::-1]).T)


def stack(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Stacks tensors of one shape and dtype along a new axis."""
    first = tensors[0]
    for tensor in tensors[1:]:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"tensors of one stack must be alike; one is {first.dtype}{list(first.shape)}, another {tensor.dtype}"
                f"{list(tensor.shape)}"
            )

    def read(index: Index) -> np.ndarray:
        members = tensors[index[axis]]
        rest = index[:axis] + index[axis + 1 :]
        shape = tuple(s.stop - s.start for s in rest)
        out = np.empty((*shape[:axis], len(members), *shape[axis:]), first.dtype)
        for i, member in enumerate(members):
            copy_into(out[(slice(None),) * axis + (i,)], member.read(rest))
        return out

    return LazyTensor((*first.shape[:axis], len(tensors), *first.shape[axis:]), first.dtype, read)


def take(tensor: LazyTensor, i: int, axis: int = 0) -> LazyTensor:
    """Returns the i-th member of a stack: `stack`'s inverse."""
    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]

    def read(index: Index) -> np.ndarray:
        block = tensor.read((*index[:axis], slice(i, i + 1), *index[axis:]))
        return np.squeeze(block, axis)

    return LazyTensor(shape, tensor.dtype, read)


def narrow(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Returns rows start..stop of the first axis."""

    def read(index: Index) -> np.ndarray:
        return tensor.read((slice(start + index[0].start, start + index[0].stop), *index[1:]))

    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, read)


def concatenate(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Joins parts one after the other along the first axis: what `narrow` took apart."""
    starts = np.cumsum([0, *(part.shape[0] for part in parts)]).tolist()

    def read(index: Index) -> np.ndarray:
        blocks = []
        for part, start in zip(parts, starts, strict=False):
            low, high = max(index[0].start - start, 0), min(index[0].stop - start, part.shape[0])
            if low < high:
                blocks.append(part.read((slice(low, high), *index[1:])))
        if len(blocks) == 1:
            return blocks[0]
        empty = np.empty((0, *(s.stop - s.start for s in index[1:])), parts[0].dtype)
        return np.concatenate(blocks) if blocks else empty

    return LazyTensor((starts[-1], *parts[0].shape[1:]), parts[0].dtype, read)


def repeat(tensor: LazyTensor, times: int) -> LazyTensor:
    """Returns the same tensor `times` times along a new first axis."""
    return stack([tensor] * times)


def join_axes(tensor: LazyTensor, first: int) -> LazyTensor:
    """Joins the axes `first` and `first + 1`: heads and their dimension, [H, K] to [H*K]."""
    shape = (*tensor.shape[:first], tensor.shape[first] * tensor.shape[first + 1], *tensor.shape[first + 2 :])
    return LazyTensor(shape, tensor.dtype, lambda index: tensor.numpy().reshape(shape)[index])


def copy_into(out: np.ndarray, block: np.ndarray) -> None:
    """Copies the block into `out`; a transposed matrix goes in strips that stay in the cache, which is 2.5 times as fast."""
    if block.ndim != 2 or block.flags.c_contiguous:
        out[...] = block
        return
    for start in range(0, block.shape[1], _STRIP):
        out[:, start : start + _STRIP] = block[:, start : start + _STRIP]


def contiguous(block: np.ndarray) -> np.ndarray:
    """Returns the block in row-major order, copied only if it is not."""
    if block.flags.c_contiguous:
        return block
    out = np.empty(block.shape, block.dtype)
    copy_into(out, block)
    return out


def cast(tensor: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """Returns the tensor in another dtype."""
    if tensor.dtype == dtype:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda index: tensor.read(index).astype(dtype))


def same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    """Returns whether two tensors hold the same bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = f"u{a.dtype.itemsize}"
    pairs = zip(a.blocks(), b.blocks(), strict=True)
    return all(np.array_equal(contiguous(x).view(bits), contiguous(y).view(bits)) for x, y in pairs)
