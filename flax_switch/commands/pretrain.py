"""flax-switch pretrain --config configs/tiny.py --workdir runs/tiny [--config.train.steps=500 ...]"""

from __future__ import annotations

import argparse

from flax_switch.commands.options import add_recipe_arguments, load_config, take_overrides

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides and workdir."""
    add_recipe_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; the same one continues it")


def run(args: argparse.Namespace) -> int:
    """Trains, then writes samples and the report; exit status 0, or 1 where a signal stopped the run before its end."""
    config = load_config(args)
    from flax_switch.training.finish import finish
    from flax_switch.training.loop import pretrain

    result = pretrain(config, args.workdir)
    if not result.finished:
        return 1
    finish(result, args.workdir)
    return 0
