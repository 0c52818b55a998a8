"""Arrays of experts that lie in files: what stands for them among parameters, how a program calls out for them, how it is run."""

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Int

from flax_switch.config import ConfigError
from flax_switch.host.expert_cache import ExpertCache, ExpertReads
from flax_switch.ops.kernels import platforms

T = TypeVar("T")

caches: weakref.WeakValueDictionary[int, ExpertCache] = weakref.WeakValueDictionary()  # programs outlive their models


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class OnDisk:
    """An array of a layer's experts that is not in memory: it stands at its place in a tree of parameters, without a leaf."""

    cache: ExpertCache
    layer: str  # such as "decoder/layers_3"
    name: str  # of the array among the experts', such as "wi/kernel"
    few: bool = False  # whether the program decodes few rows, see `narrow`

    def __post_init__(self) -> None:
        if self.cache is not None:
            caches[self.cache.number] = self.cache

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, [E, ...]."""
        return self.cache.parts[self.layer][self.name][0]

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype."""
        return self.cache.parts[self.layer][self.name][1]

    def __repr__(self) -> str:
        return f"OnDisk({self.layer}/{self.name})"

    def tree_flatten(self) -> tuple[tuple[()], tuple[int, str, str, bool]]:
        """Returns no leaves, and what tells one from another."""
        return (), (self.cache.number, self.layer, self.name, self.few)

    @classmethod
    def tree_unflatten(cls, known: tuple[int, str, str, bool], leaves: tuple[()]) -> Self:
        """Returns the inverse of `tree_flatten`, as long as the model lives."""
        number, *others = known
        return cls(caches.get(number), *others)  # pyright: ignore[reportArgumentType]


def first_on_disk(tree: Any) -> OnDisk | None:
    """Returns an array of a tree of parameters that is on disk, if one is."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, OnDisk))
    return next((leaf for leaf in leaves if isinstance(leaf, OnDisk)), None)


def check_in_memory(params: Any, what: str) -> None:
    """Raises `ConfigError` for parameters of which experts are on disk, in a sentence that begins with `what`."""
    if first_on_disk(params) is not None:
        raise ConfigError(
            f"{what} needs all parameters in memory, and this model's experts are on disk. Load it without experts='disk'."
        )


class _Unreadable(Exception):
    """Ends a program; the reason is kept in the cache."""


# JAX logs what a callback raises, with a traceback; the reason is raised again in words where the program was called.
logging.getLogger("jax._src.callback").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _Unreadable))
)


def fetch_arrays(
    experts: OnDisk, expert: Int[Array, ""], rows: Int[Array, " E"], *, implementation: str | None = None
) -> dict[str, Array]:
    """Returns an expert's arrays by name. rows: how many hit each of the layer's; those that are hit have to be fetched in order.

    implementation: one of IMPLEMENTATIONS; by default DEFAULT's for the platform.
    """
    bound = {name: functools.partial(call, experts) for name, call in IMPLEMENTATIONS.items()}
    return platforms.run(bound, DEFAULT, implementation, expert, rows)


def _shapes(experts: OnDisk) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape[1:], dtype) for name, (shape, dtype) in experts.cache.parts[experts.layer].items()}


def _arrays(experts: OnDisk, expert: Array, rows: Array) -> dict[str, Array]:
    """Has the host return arrays, which JAX copies."""
    read = functools.partial(_read, experts.cache.number, experts.layer)
    return jax.pure_callback(read, _shapes(experts), expert, rows)


def _buffers(experts: OnDisk, expert: Array, rows: Array) -> dict[str, Array]:
    """Has the host write into the program's own memory, which takes a fifth of the time that `pure_callback` takes to be called."""
    number, layer = experts.cache.number, experts.layer

    def read(context: Any, out: dict[str, Any], expert: Any, rows: Any) -> None:
        for name, array in _read(number, layer, expert, rows).items():
            np.copyto(np.asarray(out[name]), array)

    return buffer_callback(read, _shapes(experts))(expert, rows)


def _read(number: int, layer: str, expert: Any, rows: Any) -> Mapping[str, np.ndarray]:
    cache = caches[number]
    if cache.failure is None:
        try:
            return cache.get(layer, int(np.asarray(expert)), np.asarray(rows))
        except Exception as error:
            cache.failure = error
    raise _Unreadable


IMPLEMENTATIONS = {"reference": _arrays, "buffers": _buffers}
DEFAULT = {"cpu": "buffers", "other": "reference"}


def run_reading(params: Any, run: Callable[[], T]) -> tuple[T, ExpertReads | None]:
    """Returns what a program gives and what it read of the experts on disk; where all are in memory, None.

    Raises the error that names the expert, if one could not be read.
    """
    found = first_on_disk(params)
    if found is None:
        return run(), None
    cache, before = found.cache, found.cache.reads
    with cache.at_work():
        try:
            result = jax.block_until_ready(run())
        except Exception:  # JAX raises errors of several types for what a callback raised
            if cache.failure is None:
                raise
            raise cache.failure from None
        if cache.failure is not None:
            raise cache.failure
    return result, cache.reads - before
