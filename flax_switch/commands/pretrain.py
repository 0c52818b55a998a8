"""flax-switch pretrain --config configs/tiny.py --workdir runs/tiny [--config.train.steps=500 ...]"""

from __future__ import annotations

import argparse

from flax_switch.commands.look import caches_that_go, dry_run
from flax_switch.commands.options import load_config, take_overrides
from flax_switch.commands.training import add_training_arguments, train_as_told
from flax_switch.config import ExperimentConfig
from flax_switch.config.shipped import names

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds recipe, overrides, workdir, and how several processes find each other."""
    add_training_arguments(parser, "pretraining")
    parser.add_argument("--program", metavar="DIR", help="a train step that plan --save-program has compiled, to be loaded instead")


def run(args: argparse.Namespace) -> int:
    """Trains, then writes samples and the report; exit status 0, or 1 where a signal stopped the run before its end."""
    config = load_config(args)
    return train_as_told(args, config, lambda: _look(config), lambda: _train(args, config))


def _look(config: ExperimentConfig) -> int:
    from flax_switch import data

    with caches_that_go(config.data) as settings:
        return dry_run(config, data.prepare(settings))


def _train(args: argparse.Namespace, config: ExperimentConfig) -> bool:
    from flax_switch.training.checkpoint import OtherRunError
    from flax_switch.workflows.finish import finish
    from flax_switch.workflows.pretrain import pretrain

    try:
        result = pretrain(config, args.workdir, profile=args.profile, verify=not args.no_verify, program=args.program)
    except OtherRunError as error:
        raise OtherRunError(f"{error}{_former_recipe(args.workdir)}") from error
    if result.finished:
        finish(result, args.workdir)
    return result.finished


def _former_recipe(workdir: str) -> str:
    """Returns a sentence on the recipe that continues the run in `workdir`, where one that comes with the package does; else ''."""
    from flax_switch.config.recipes import load_recipe
    from flax_switch.training.checkpoint import differing_fields, read_config

    found = read_config(workdir)
    recipes = ((name, load_recipe(name)) for name in names())
    same = (name for name, recipe in recipes if isinstance(recipe, ExperimentConfig) and not differing_fields(found, recipe))
    name = next(same, None)
    return "" if name is None else f" --config {name} --workdir {workdir} continues the run that is there."
