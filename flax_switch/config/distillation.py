"""Settings of distillation: those of pre-training the student, and how much its teacher counts (2101.03961, section 4.2)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax_switch.config import ExperimentConfig, check
from flax_switch.config.base import _Section


@dataclasses.dataclass(frozen=True)
class DistillationConfig(_Section):
    """What the student takes from its teacher; the defaults are the paper's best."""

    teacher_weight: float = 0.25  # of the teacher's probabilities in the targets; the rest is the true token's
    copy_weights: bool = True  # the student starts from the teacher's weights, expert layers apart

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0.0 <= self.teacher_weight <= 1.0,
            f"distillation.teacher_weight must lie in [0, 1]; it is {self.teacher_weight}.",
        )


@dataclasses.dataclass(frozen=True)
class DistillConfig(ExperimentConfig):
    """A whole distillation run: `model` is the student's."""

    kind: ClassVar[str] = "distillation"

    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    teacher: str = ""  # where its checkpoint is
