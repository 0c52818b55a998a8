"""What is in a checkpoint, told from its headers: format, config, parameter counts, dtypes, shapes and experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import SwitchConfig
from flax_switch.convert.canonical import KINDS, is_expert, is_router, kind_of, parameters_of
from flax_switch.convert.checkpoint import open_checkpoint


@dataclasses.dataclass(frozen=True)
class Description:
    """A checkpoint as its headers tell it. Counts are of parameters."""

    format: str
    path: Path
    architecture: str
    config: SwitchConfig
    total: int
    active: int  # that take part in computing one token: all but the experts it is not sent to
    by_kind: Mapping[str, int]
    by_dtype: Mapping[str, int]
    nbytes: int
    sparse_layers: Mapping[str, Sequence[int]]
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]  # path with equal layers taken together -> dtype and shape

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as plain JSON-able values."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "path": str(self.path),
            "config": self.config.to_dict(),
            "sparse_layers": {stack: list(layers) for stack, layers in self.sparse_layers.items()},
            "shapes": {path: [dtype, list(shape)] for path, (dtype, shape) in self.shapes.items()},
        }


def describe(
    source: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    verify: bool = True,
) -> Description:
    """Reads a checkpoint's headers (any format) and describes it; no weights are loaded.

    Arguments and errors are `open_checkpoint`'s.
    """
    opened = open_checkpoint(source, changes=changes, allow_missing=allow_missing, revision=revision, verify=verify)
    config, sizes = opened.config, {path: parameters_of(path, t.shape, t.dtype) for path, t in opened.tensors.items()}
    by_kind, by_dtype = dict.fromkeys((kind for kind, _ in KINDS), 0), {}
    for path, tensor in opened.tensors.items():
        by_kind[kind_of(path)] += sizes[path]
        by_dtype[tensor.dtype.name] = by_dtype.get(tensor.dtype.name, 0) + sizes[path]
    stacks = config.stacks[:1] if opened.architecture == "encoder" else config.stacks
    total = sum(sizes.values())
    idle = sum(size - size * config.num_selected_experts // config.num_experts for path, size in sizes.items() if is_expert(path))
    return Description(
        format=opened.format,
        path=opened.path,
        architecture=opened.architecture,
        config=config,
        total=total,
        active=total - idle,
        by_kind={kind: count for kind, count in by_kind.items() if count},
        by_dtype=by_dtype,
        nbytes=sum(tensor.nbytes for tensor in opened.tensors.values()),
        sparse_layers={stack.name: stack.sparse_layers for stack in stacks},
        shapes=collapse_layers({path: (t.dtype.name, t.shape) for path, t in opened.tensors.items()}),
    )


def collapse_layers(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns layers whose tensor of one name has the same dtype and shape as one entry: `encoder/layers_{0,2,4}/...`."""
    groups: dict[tuple, list[str]] = {}
    for path, entry in shapes.items():
        match = re.fullmatch(r"(\w+)/layers_(\d+)/(.+)", path)
        key = (path, "", entry) if match is None else (match[1], match[3], entry)
        groups.setdefault(key, []).append("" if match is None else match[2])
    collapsed = {}
    for (stack, rest, entry), layers in groups.items():
        if not rest:
            collapsed[stack] = entry
            continue
        numbers = layers[0] if len(layers) == 1 else "{" + _ranges([int(i) for i in layers]) + "}"
        collapsed[f"{stack}/layers_{numbers}/{rest}"] = entry
    return collapsed


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(map(str, numbers))


def render(description: Description) -> str:
    """Returns the description as text."""
    d, config = description, description.config
    lines = [
        f"{d.path}: {d.format}, {d.architecture}" + (f", {config.mlp_activations[0]}" if not config.is_gated else ", gated"),
        f"  parameters      {d.total:,} in total, {d.active:,} active per token ({d.nbytes / 1e9:.3f} GB)",
        *(f"    {kind:<20}{count:>16,}" for kind, count in d.by_kind.items()),
        "  dtypes          " + ", ".join(f"{name} {count:,}" for name, count in d.by_dtype.items()),
    ]
    if config.is_sparse:
        layers = "; ".join(f"{stack} layers {', '.join(map(str, i)) or 'none'}" for stack, i in d.sparse_layers.items())
        lines.append(
            f"  experts         {config.num_experts} in each sparse layer, {config.num_selected_experts} per token; {layers}"
        )
        routers = [shape for path, (_, shape) in d.shapes.items() if is_router(path)]
        lines.append(f"  routers         {config.router_type}, {len(routers)} kind(s), capacity {_capacity(config)}")
    default = SwitchConfig()
    changed = {name: value for name, value in config.to_dict().items() if value != default.to_dict()[name]}
    lines += ["  config (where it differs from the defaults)", *(f"    {name} = {value!r}" for name, value in changed.items())]
    width = max(map(len, d.shapes), default=0)
    lines += ["  shapes", *(f"    {path:<{width}}  {dtype:<9} {list(shape)}" for path, (dtype, shape) in d.shapes.items())]
    return "\n".join(lines)


def _capacity(config: SwitchConfig) -> str:
    if config.capacity_mode == "fixed":
        return f"{config.expert_capacity} per {config.routing_group}"
    return config.capacity_mode if config.capacity_mode == "dropless" else f"factor {config.capacity_factor}"
