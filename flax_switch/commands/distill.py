"""flax-switch distill --config configs/distill_tiny.py --teacher runs/tiny --workdir runs/student"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import FORMATS
from flax_switch.commands.look import caches_that_go, dry_run
from flax_switch.commands.options import load_config, take_overrides
from flax_switch.commands.training import add_training_arguments, train_as_told
from flax_switch.config.distillation import DistillConfig

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds recipe, overrides, teacher and workdir."""
    add_training_arguments(parser, "distillation")
    parser.add_argument("--teacher", required=True, metavar="CHECKPOINT", help=FORMATS)


def run(args: argparse.Namespace) -> int:
    """Trains the student, then writes samples and the report; exit status 0, or 1 where a signal stopped the run before its end."""
    config = load_config(args).replace(teacher=args.teacher)
    return train_as_told(args, config, lambda: _look(args, config), lambda: _train(args, config))


def _look(args: argparse.Namespace, config: DistillConfig) -> int:
    from flax_switch import data
    from flax_switch.convert.checkpoint import open_checkpoint
    from flax_switch.convert.tokenizer import load_vocabulary

    with caches_that_go(config.data) as settings:
        return dry_run(config, data.prepare(settings, vocabulary=load_vocabulary(open_checkpoint(args.teacher).path)))


def _train(args: argparse.Namespace, config: DistillConfig) -> bool:
    from flax_switch.workflows.distill import distill
    from flax_switch.workflows.finish import finish

    result = distill(config, args.workdir, profile=args.profile, verify=not args.no_verify)
    if result.finished:
        finish(result, args.workdir)
    return result.finished
