"""An adapter with its tensors unread, whether it is for a model, and what the two become together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig, check
from flax_switch.config.adapter import PARTS, AdapterConfig, combined, matrix, part_shapes
from flax_switch.config.ranges import shown
from flax_switch.convert.canonical import canonical_shapes, is_expert
from flax_switch.convert.tensors import CheckpointError, Index, LazyTensor, stack, take

SHOWN = 4  # names of each kind in a message
FINGERS = 8  # rows of the embeddings, and numbers of each, that tell a model from another

Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # a, b times its scale, and the magnitude


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rank and alpha of a kernel's adapter, or of each expert's; rank 0 is an expert without one."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter, its tensors unread: of kernel "path" they are "path/a", "path/b" and with DoRA "path/magnitude".

    A stack of experts has parts of the largest rank, in which the others' end with zeros. `base` is the name of the model that it
    was trained on, and `fingerprint` some of its numbers, where they are known; `prefixes` are what its tasks had before inputs.
    """

    config: AdapterConfig
    tensors: Mapping[str, LazyTensor]
    kernels: Mapping[str, Ranks]
    base: str = ""
    fingerprint: tuple[float, ...] = ()
    prefixes: tuple[str, ...] = ()

    def scales(self, path: str) -> np.ndarray:
        """Returns what a b of a kernel is multiplied by: [] or, of experts, [E]."""
        found = self.kernels[path]
        scales = [self.config.scale(rank, alpha) for rank, alpha in zip(found.ranks, found.alphas, strict=True)]
        return np.array(scales if is_expert(path) else scales[0], np.float32)

    def parts(self, path: str) -> Parts:
        """Returns a, b times its scale, and the magnitude of a kernel, if there is one."""
        a, b, magnitude = (self.tensors.get(f"{path}/{name}") for name in PARTS)
        assert a is not None and b is not None
        scaled = b.numpy().astype(np.float32) * self.scales(path)[..., None, None]
        return a.numpy(), scaled.astype(b.dtype), None if magnitude is None else magnitude.numpy()

    def count(self) -> int:
        """Returns how many parameters it has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def shapes(config: SwitchConfig, settings: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of an adapter with these settings for a model, by canonical path, with their shapes."""
    found = canonical_shapes(config.replace(weights="float"))
    return {
        f"{path}/{name}": shape
        for path in settings.kernels(found)
        for name, shape in part_shapes(path, found[path], settings.rank, dora=settings.use_dora).items()
    }


def uniform(config: AdapterConfig, tensors: Mapping[str, LazyTensor], base: str, fingerprint: tuple[float, ...]) -> Adapter:
    """Returns the adapter of tensors that have one rank and one alpha, as in a run."""
    kernels = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition("/")
        if part == "a":
            count = tensor.shape[0] if is_expert(path) else 1
            kernels[path] = Ranks((config.rank,) * count, (config.alpha,) * count)
    return Adapter(config, tensors, kernels, base, fingerprint)


def check_fits(where: object, adapter: Adapter, config: SwitchConfig, architecture: str) -> None:
    """Raises `CheckpointError` that names what of an adapter a model has no place for."""
    shapes = canonical_shapes(config.replace(weights="float"), architecture)
    unknown, wrong, expected = [], [], set()
    for path, found in adapter.kernels.items():
        if path not in shapes:
            unknown.append(path)
            continue
        for name, shape in part_shapes(path, shapes[path], max(found.ranks), dora=adapter.config.use_dora).items():
            expected.add(f"{path}/{name}")
            tensor = adapter.tensors.get(f"{path}/{name}")
            if tensor is None or tensor.shape != shape:
                wrong.append(
                    f"{path}/{name} is {'missing' if tensor is None else list(tensor.shape)} where {list(shape)} is wanted"
                )
        experts = shapes[path][0] if is_expert(path) else 1
        if not len(found.ranks) == len(found.alphas) == experts:
            wrong.append(f"{path} has ranks for {len(found.ranks)} experts, of which the model has {experts}")
    left = [name for name in adapter.tensors if name not in expected and name.rpartition("/")[0] in shapes]
    refuse(where, adapter.base, unknown + left, wrong)


def refuse(where: object, base: str, unknown: list[str], wrong: list[str]) -> None:
    """Raises `CheckpointError` that names what of an adapter is for another model, if anything is."""
    found = []
    for what, names in (("left over", unknown), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            found.append(f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    if found:
        trained = f" (it was trained on {shown(base, str)})" if base else ""
        raise CheckpointError(f"{where} is an adapter of another model{trained}: {'; '.join(found)}.")


def fingerprint(tensors: Mapping[str, Any], embedding: str) -> tuple[float, ...]:
    """Returns numbers that tell a model from others: some of its embeddings, which no quantising and no adapter changes.

    tensors: lazy ones or arrays, by canonical path. embedding: the path of the embeddings.
    """
    table = tensors[embedding]
    rows = np.linspace(0, table.shape[0] - 1, FINGERS).astype(int)
    columns = slice(0, min(FINGERS, table.shape[1]))
    read = table.read if isinstance(table, LazyTensor) else table.__getitem__
    numbers = np.concatenate([np.asarray(read((slice(row, row + 1), columns)), np.float32)[0] for row in map(int, rows)])
    return tuple(float(f"{number:.6g}") for number in numbers)


def check_base(where: object, adapter: Adapter, tensors: Mapping[str, Any], config: SwitchConfig) -> None:
    """Raises `CheckpointError` where a model is not the one an adapter was trained on, but for rounding to 16 bits."""
    if not adapter.fingerprint:
        return
    if not same_model(adapter.fingerprint, fingerprint(tensors, config.embedding_path)):
        raise CheckpointError(
            f"{where} is an adapter of another model{f', {adapter.base}' if adapter.base else ''}: its shapes fit, but the "
            "embeddings of this one are others. Load it with the model that it was trained on."
        )


def same_model(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Returns whether two fingerprints are of the same numbers, which may have been rounded to 16 bits."""
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-2, atol=1e-6)


def merged(adapter: Adapter, config: SwitchConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns a model's canonical tensors with an adapter in them, in their dtypes; each kernel is added to when it is read.

    Raises:
      ConfigError: for integers, to which a small addition cannot be made.
    """
    check(
        config.weights == "float",
        f"An adapter cannot be merged into {config.weights} weights: a small addition to integers is lost. Merge it into the float "
        "model, and quantise what comes out; or use it unmerged.",
    )
    return {**tensors, **{path: _merged(adapter, path, tensors[path]) for path in adapter.kernels}}


def _merged(adapter: Adapter, path: str, tensor: LazyTensor) -> LazyTensor:
    if not is_expert(path):
        return _one(tensor, path, lambda: adapter.parts(path))
    a, b, magnitude = adapter.parts(path)
    members = [take(tensor, e) for e in range(tensor.shape[0])]
    for e, rank in enumerate(adapter.kernels[path].ranks):
        if rank:
            own = (a[e], b[e], None if magnitude is None else magnitude[e])
            members[e] = _one(members[e], path, lambda own=own: own)
    return stack(members)


def _one(tensor: LazyTensor, path: str, parts: Callable[[], Parts]) -> LazyTensor:
    """Returns a kernel, not a stack, that an adapter is added to."""
    size = matrix(path.replace("/expert/", "/"), tensor.shape)

    def read(index: Index) -> np.ndarray:
        arrays = (None if part is None else part.astype(np.float32) for part in parts())
        total = combined(tensor.numpy().astype(np.float32).reshape(size), *arrays)
        return total.astype(tensor.dtype).reshape(tensor.shape)[index]

    return LazyTensor(tensor.shape, tensor.dtype, read)
