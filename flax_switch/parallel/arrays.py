"""Arrays of which each process holds a part, read as wholes: everywhere, or by process 0 alone, piece by piece."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flax_switch.parallel import processes
from flax_switch.parallel.mesh import replicated

Slices = tuple[slice, ...]  # one an axis, with plain start and stop


def readable(x: Any) -> bool:
    """Returns whether this process can read an array as it is: it holds all of it, or each device does."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def on_host(tree: Any) -> Any:
    """Returns a tree's arrays as numpy's, whole in every process; all processes that hold parts of them make this call."""
    return jax.device_get(jax.tree.map(lambda x: x if readable(x) else multihost_utils.process_allgather(x, tiled=True), tree))


def let_first_read(tree: Any, work: Callable[[Any], object]) -> None:
    """Has process 0 call `work` with a tree whose arrays it can read, though others hold parts of them; all make this call.

    No process ever holds a whole tree: process 0 says which block of which array it reads next, and all devices send theirs.
    `work` may read in any order, in this thread; it must make no call that all processes have to make.
    """
    leaves, structure = jax.tree.flatten(tree)
    first = jax.process_index() == 0
    if all(map(readable, leaves)):
        if first:
            work(tree)
        return
    if first:
        work(structure.unflatten([leaf if readable(leaf) else _Read(leaf, i) for i, leaf in enumerate(leaves)]))
        processes.from_first(None)
        return
    nothing: Any = None
    while (wanted := processes.from_first(nothing)) is not None:
        number, start, sizes = wanted
        _block(leaves[number], start, sizes)


class _Read:
    """An array of several processes in process 0's hand: what is read of it, all send."""

    def __init__(self, array: jax.Array, number: int):
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self._array, self._number = array, number

    def __getitem__(self, index: Slices) -> np.ndarray:
        if not all(isinstance(one, slice) and one.step in (None, 1) for one in index):
            return np.asarray(self)[index]
        bounds = [one.indices(size)[:2] for one, size in zip(index, self.shape, strict=False)]
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        start, sizes = [a for a, _ in bounds], [max(b - a, 0) for a, b in bounds]
        processes.from_first([self._number, start, sizes])
        return _block(self._array, start, sizes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


def _block(array: jax.Array, start: list[int], sizes: list[int]) -> np.ndarray:
    return np.asarray(_slicer(array.sharding.mesh, tuple(sizes))(array, np.array(start, np.int32)))  # pyright: ignore


@functools.cache
def _slicer(mesh: Mesh, sizes: tuple[int, ...]) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    return jax.jit(lambda array, start: jax.lax.dynamic_slice(array, tuple(start), sizes), out_shardings=replicated(mesh))
