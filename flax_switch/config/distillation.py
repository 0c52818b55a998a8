"""Settings of distillation: those of pre-training the student, and how much its teacher counts (2101.03961, section 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from flax_switch.config import ExperimentConfig
from flax_switch.config.base import _Section, check, may_change
from flax_switch.config.ranges import Range


@dataclasses.dataclass(frozen=True)
class DistillationConfig(_Section):
    """What the student takes from its teacher; the defaults are the paper's best."""

    section: ClassVar[str] = "distillation"

    # of the teacher's probabilities in the targets; the rest is the true token's
    teacher_weight: Annotated[float, Range(0, 1)] = 0.25
    copy_weights: bool = True  # the student starts from the teacher's weights, except the expert layers
    # a folder of the teacher's probabilities, computed where they are missing; then the teacher is in no step's memory
    cached_teacher: str | None = may_change(None)
    # how many of each target's probabilities are kept, the others' only as their sum; None: all
    top_k: Annotated[int, Range(least=1, off="None keeps all.")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.top_k is None or self.cached_teacher is not None,
            "distillation.top_k is of probabilities that are kept: name a folder in distillation.cached_teacher, or leave it out.",
        )


@dataclasses.dataclass(frozen=True)
class DistillConfig(ExperimentConfig):
    """A whole distillation run: `model` is the student's."""

    kind: ClassVar[str] = "distillation"

    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    teacher: str = ""  # where its checkpoint is
