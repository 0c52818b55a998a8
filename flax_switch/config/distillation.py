"""Settings of distillation: those of pre-training the student, and how much its teacher counts (2101.03961, section 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from flax_switch.config import ExperimentConfig
from flax_switch.config.base import _Section
from flax_switch.config.ranges import Range


@dataclasses.dataclass(frozen=True)
class DistillationConfig(_Section):
    """What the student takes from its teacher; the defaults are the paper's best."""

    section: ClassVar[str] = "distillation"

    # of the teacher's probabilities in the targets; the rest is the true token's
    teacher_weight: Annotated[float, Range(0, 1)] = 0.25
    copy_weights: bool = True  # the student starts from the teacher's weights, except the expert layers


@dataclasses.dataclass(frozen=True)
class DistillConfig(ExperimentConfig):
    """A whole distillation run: `model` is the student's."""

    kind: ClassVar[str] = "distillation"

    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    teacher: str = ""  # where its checkpoint is
