"""Training checkpoints: the parameters in an Orbax checkpoint that `flax-switch pretrain` or `finetune` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax_switch.config import SwitchConfig
from flax_switch.convert.tensors import LazyTensor


def find_checkpoint(folder: Path) -> Path | None:
    """The step folder a path means: itself, or the latest step of a run."""
    return None


def read_orbax(folder: Path, *, allow_missing: Sequence[str] = ()) -> tuple[SwitchConfig, str, dict[str, LazyTensor]]:
    """The config, architecture and canonical tensors of a training checkpoint."""
