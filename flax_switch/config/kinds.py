"""Whole configs by their kind: what a recipe says, and what the workdir of a run holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_switch.config.base import one_of
from flax_switch.config.distillation import DistillConfig
from flax_switch.config.finetuning import FinetuneConfig, FinetuneRecipe
from flax_switch.config.run import ExperimentConfig

Recipe = ExperimentConfig | DistillConfig | FinetuneRecipe
RunConfig = ExperimentConfig | DistillConfig | FinetuneConfig

RECIPES = {config.kind: config for config in (ExperimentConfig, DistillConfig, FinetuneRecipe)}
RUNS = {config.kind: config for config in (ExperimentConfig, DistillConfig, FinetuneConfig)}


def kind_of(values: Mapping[str, Any]) -> str:
    """Returns the kind of a whole config's values; where they say none, as in 0.1.0, a section that no other kind has tells."""
    if "kind" in values:
        one_of("kind", values["kind"], tuple(RECIPES))
        return values["kind"]
    if "evaluation" in values:
        return FinetuneRecipe.kind
    return DistillConfig.kind if "distillation" in values else ExperimentConfig.kind
