"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.config_distillation import DistillConfig
from flax_switch.config_finetuning import FinetuneRecipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """--config or --gin_file, and overrides of either."""
    parser.add_argument("--config", metavar="FILE", help="a recipe, such as configs/tiny.py")
    parser.add_argument("--gin_file", metavar="FILE", action="append", default=[], help="a gin file that names and changes one")
    parser.epilog = (
        "Any field can be set: --config.SECTION.FIELD=VALUE with --config, --gin.SECTION.FIELD=VALUE with --gin_file; "
        "sections are model, data, optimizer, mesh, train."
    )


def take_overrides(args: argparse.Namespace, rest: list[str]) -> None:
    """Sorts what argparse did not know into args.overrides and args.bindings; anything else is an error."""
    args.overrides, args.bindings = [], []
    rest = list(rest)
    while rest:
        text = rest.pop(0)
        for prefix, place in (("--config.", args.overrides), ("--gin.", args.bindings)):
            if text.startswith(prefix):
                text = text.removeprefix(prefix)
                if "=" not in text and rest and not rest[0].startswith("--"):
                    text = f"{text}={rest.pop(0)}"
                place.append(text)
                break
        else:
            raise ConfigError(f"Unknown argument {text!r}; fields are set with --config.SECTION.FIELD=VALUE. See --help.")


def load_config(args: argparse.Namespace) -> ExperimentConfig:
    """The pre-training config that the arguments name."""
    return _of_kind(args, ExperimentConfig)


def load_distillation(args: argparse.Namespace) -> DistillConfig:
    """The distillation config that the arguments name."""
    return _of_kind(args, DistillConfig)


def load_finetuning(args: argparse.Namespace) -> FinetuneRecipe:
    """The fine-tuning recipe that the arguments name."""
    return _of_kind(args, FinetuneRecipe)


# What a recipe is -> the command that runs it, and a recipe of the kind.
_KINDS = {
    ExperimentConfig: ("pretrain", "configs/tiny.py"),
    DistillConfig: ("distill", "configs/distill_tiny.py"),
    FinetuneRecipe: ("finetune", "configs/finetune_summarization.py"),
}


def _of_kind(args: argparse.Namespace, kind: type) -> Any:
    config = load_any(args)
    command, _ = _KINDS[type(config)]
    if type(config) is not kind:
        raise ConfigError(
            f"{args.config or args.gin_file[0]} is a recipe for flax-switch {command}; this command takes one such as "
            f"{_KINDS[kind][1]}."
        )
    return config


def load_any(args: argparse.Namespace) -> ExperimentConfig | DistillConfig | FinetuneRecipe:
    """What the arguments name, of any kind."""
    from flax_switch import recipes

    if bool(args.config) == bool(args.gin_file):
        raise ConfigError("Name a recipe: either --config configs/tiny.py or --gin_file configs/gin/tiny.gin.")
    if args.config:
        if args.bindings:
            raise ConfigError("--gin.… binds fields of a --gin_file; with --config use --config.SECTION.FIELD=VALUE.")
        return recipes.load_recipe(args.config, args.overrides)
    if args.overrides:
        raise ConfigError("--config.… sets fields of a --config recipe; with --gin_file use --gin.SECTION.FIELD=VALUE.")
    return recipes.load_gin(args.gin_file, args.bindings)
