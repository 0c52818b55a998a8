"""What the commands that train have in common: their arguments, and to look first, to train, and then to report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from flax_switch.commands.checkpoints import add_verify_argument
from flax_switch.commands.look import add_look_arguments, check_look, print_config
from flax_switch.commands.options import (
    add_compile_cache_argument,
    add_distributed_arguments,
    add_recipe_arguments,
    connection,
    start_jax,
)


def add_training_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Adds recipe and overrides, workdir, what to look at first, and how several processes find each other."""
    add_recipe_arguments(parser, kind)
    add_distributed_arguments(parser)
    add_compile_cache_argument(parser)
    add_look_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; the same one continues it")
    add_verify_argument(parser)


def train_as_told(args: argparse.Namespace, config: Any, look: Callable[[], int], train: Callable[[], bool]) -> int:
    """Prints the config (--print-config), looks at the run (--dry-run), or trains.

    look: prints what the run would do; its exit status. train: trains and reports, and says whether the run came to its end.
    Exit status 0, or 1 where a signal stopped the run before its end.
    """
    others = connection(args)
    check_look(args)
    if args.print_config:
        return print_config(config)
    start_jax(args)
    if args.dry_run:
        return look()
    from flax_switch.parallel import processes

    with processes.session(others):
        return 0 if train() else 1
