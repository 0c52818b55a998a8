"""What is in an adapter, told from its headers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_switch.config.adapter import AdapterConfig
from flax_switch.convert import peft
from flax_switch.convert.adapter_folder import adapter_format, read_native, read_run
from flax_switch.convert.doors import readable
from flax_switch.inspection.checkpoint import collapse_layers


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """An adapter as its headers tell it."""

    format: str
    path: Path
    config: AdapterConfig
    base: str  # the model that it was trained on, as far as it is known
    total: int  # parameters
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]  # path with equal layers taken together -> dtype and shape

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as plain JSON-able values."""
        shapes = {path: [dtype, list(shape)] for path, (dtype, shape) in self.shapes.items()}
        return {**vars(self), "path": str(self.path), "config": self.config.to_dict(), "shapes": shapes}


def describe_adapter(source: str | Path) -> AdapterDescription | None:
    """Describes the adapter in a folder, whatever model it is for; returns None where there is none. Raises as `open_adapter`."""
    folder = Path(source)
    with readable(folder):
        format = adapter_format(folder)
        if format is None:
            return None
        if format == "peft":
            config, base, tensors = peft.adapter_config(folder), peft.base_of(folder), peft.read_tensors(folder)
        else:
            adapter = read_native(folder) if format == "flax_switch" else read_run(folder)
            config, base, tensors = adapter.config, adapter.base, adapter.tensors
    shapes = {path: (tensor.dtype.name, tensor.shape) for path, tensor in tensors.items()}
    total = sum(math.prod(shape) for _, shape in shapes.values())
    return AdapterDescription(format, folder, config, base, total, collapse_layers(shapes))


def render_adapter(description: AdapterDescription) -> str:
    """Returns the description as text."""
    d, config = description, description.config
    scale = "alpha / sqrt(rank)" if config.use_rslora else "alpha / rank"
    width = max(map(len, d.shapes), default=0)
    return "\n".join(
        [
            f"{d.path}: {d.format}, an adapter ({'DoRA' if config.use_dora else 'LoRA'})",
            f"  model           {d.base or 'not said'}",
            f"  rank            {config.rank}, alpha {config.alpha:g}, scaled by {scale}, dropout {config.dropout:g}",
            f"  parameters      {d.total:,}",
            "  shapes",
            *(f"    {path:<{width}}  {dtype:<9} {list(shape)}" for path, (dtype, shape) in d.shapes.items()),
        ]
    )
