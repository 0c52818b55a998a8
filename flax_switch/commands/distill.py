"""flax-switch distill --config configs/distill_tiny.py --teacher runs/tiny --workdir runs/student"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import FORMATS, add_verify_argument
from flax_switch.commands.look import add_look_arguments, caches_that_go, check_look, dry_run, print_config
from flax_switch.commands.options import (
    add_compile_cache_argument,
    add_distributed_arguments,
    add_recipe_arguments,
    connection,
    load_config,
    start_jax,
    take_overrides,
)

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds recipe, overrides, teacher and workdir."""
    add_recipe_arguments(parser, "distillation")
    add_distributed_arguments(parser)
    add_compile_cache_argument(parser)
    add_look_arguments(parser)
    parser.add_argument("--teacher", required=True, metavar="CHECKPOINT", help=FORMATS)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; the same one continues it")
    add_verify_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Trains the student, then writes samples and the report; exit status 0, or 1 where a signal stopped the run before its end."""
    config, others = load_config(args).replace(teacher=args.teacher), connection(args)
    check_look(args)
    if args.print_config:
        return print_config(config)
    start_jax(args)
    if args.dry_run:
        from flax_switch import data
        from flax_switch.convert.checkpoint import open_checkpoint
        from flax_switch.convert.tokenizer import load_vocabulary

        with caches_that_go(config.data) as settings:
            return dry_run(config, data.prepare(settings, vocabulary=load_vocabulary(open_checkpoint(args.teacher).path)))
    from flax_switch.parallel import processes
    from flax_switch.workflows.distill import distill
    from flax_switch.workflows.finish import finish

    with processes.session(others):
        result = distill(config, args.workdir, profile=args.profile, verify=not args.no_verify)
        if result.finished:
            finish(result, args.workdir)
    return 0 if result.finished else 1
