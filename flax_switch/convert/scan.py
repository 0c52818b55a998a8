"""Stacks the layers of an unscanned parameter tree the way scanned layers hold them, and takes them apart again.

With `scan_layers` a block of layers repeats. Layer i of a stack is repetition i // size of `subblock_{i % size}`, and the
repetitions are stacked along axis 1 of every leaf, as in T5X: [D] becomes [D, L], an expert stack [E, D, F] becomes [E, L, D, F].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flax_switch.config import ConfigError, StackConfig, SwitchConfig
from flax_switch.convert import tensors
from flax_switch.convert.canonical import flatten, unflatten

SCAN_AXIS = 1

_LAYER = re.compile(r"(encoder|decoder)/layers_(\d{1,4})/(.+)")
_BLOCK = re.compile(r"(encoder|decoder)/\1/subblock_(\d{1,4})/(.+)")


def stack_layers(params: Mapping[str, Any], config: SwitchConfig) -> dict[str, Any]:
    """Returns the scanned form of an unscanned tree.

    Args:
      params: nested or flat ('/'-joined) dict of numpy or jax arrays or lazy tensors; the result has the same form.
      config: tells which layers repeat; `scan_layers` itself is not looked at.

    Raises:
      ConfigError: if a stack's layers do not repeat.
    """
    nested, flat = _is_nested(params), flatten(dict(params))
    result: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {}
    for path, leaf in flat.items():
        match = _LAYER.fullmatch(path)
        if match is None:
            result[path] = leaf
            continue
        stack, layer, rest = match[1], int(match[2]), match[3]
        size = _block_size(config, stack)
        groups.setdefault(f"{stack}/{stack}/subblock_{layer % size}/{rest}", {})[layer // size] = leaf
    for path, members in groups.items():
        result[path] = _stack([members[i] for i in range(len(members))])
    return unflatten(result) if nested else result


def unstack_layers(params: Mapping[str, Any], config: SwitchConfig | None = None) -> dict[str, Any]:
    """Returns the unscanned form of a scanned tree: the inverse of `stack_layers`.

    Without a config the size of the blocks is the number of their sub-blocks in the tree.

    Raises:
      CheckpointError: if a leaf of a scanned layer has no axis of layers.
    """
    nested, flat = _is_nested(params), flatten(dict(params))
    matches = {path: _BLOCK.fullmatch(path) for path in flat}
    sizes: dict[str, int] = {}
    for match in filter(None, matches.values()):
        sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1) if config is None else _block_size(config, match[1])
    result: dict[str, Any] = {}
    for path, leaf in flat.items():
        match = matches[path]
        if match is None:
            result[path] = leaf
            continue
        if len(leaf.shape) <= SCAN_AXIS:
            raise tensors.CheckpointError(f"{path} is scanned, but its shape {list(leaf.shape)} has no axis of layers")
        stack, j, rest = match[1], int(match[2]), match[3]
        for i in range(leaf.shape[SCAN_AXIS]):
            result[f"{stack}/layers_{i * sizes[stack] + j}/{rest}"] = _take(leaf, i)
    return unflatten(result) if nested else result


def _is_nested(params: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in params.values())


def _block_size(config: SwitchConfig, stack: str) -> int:
    view: StackConfig = getattr(config, stack)
    if view.block_size is None:
        raise ConfigError(f"scanned layers repeat one block, but {view.why_not_blocks}.")
    return view.block_size


def _stack(leaves: list[Any]) -> Any:
    if isinstance(leaves[0], tensors.LazyTensor):
        return tensors.stack(leaves, SCAN_AXIS)
    return leaves[0].__array_namespace__().stack(leaves, axis=SCAN_AXIS)


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, tensors.LazyTensor):
        return tensors.take(leaf, i, SCAN_AXIS)
    return leaf[:, i]
