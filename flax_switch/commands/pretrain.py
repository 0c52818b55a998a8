"""flax-switch pretrain --config configs/tiny.py --workdir runs/tiny [--config.train.steps=500 ...]"""

from __future__ import annotations

import argparse

from flax_switch.commands.options import add_distributed_arguments, add_recipe_arguments, connection, load_config, take_overrides

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, workdir, and how several processes find each other."""
    add_recipe_arguments(parser, "pretraining")
    add_distributed_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; the same one continues it")


def run(args: argparse.Namespace) -> int:
    """Trains, then writes samples and the report; exit status 0, or 1 where a signal stopped the run before its end."""
    config, others = load_config(args), connection(args)
    from flax_switch.parallel import processes
    from flax_switch.workflows.finish import finish
    from flax_switch.workflows.pretrain import pretrain

    with processes.session(others):
        result = pretrain(config, args.workdir)
        if result.finished:
            finish(result, args.workdir)
    return 0 if result.finished else 1
