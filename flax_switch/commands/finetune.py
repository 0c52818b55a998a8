"""flax-switch finetune --config configs/finetune_summarization.py --init CHECKPOINT --workdir DIR [--config.data.train=FILE ...]"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import FORMATS, add_verify_argument, explain_missing_extras
from flax_switch.commands.look import add_look_arguments, check_look, dry_run, print_config
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
    """Adds recipe, overrides, what to start from, and workdir."""
    add_recipe_arguments(parser, "finetuning")
    add_distributed_arguments(parser)
    add_compile_cache_argument(parser)
    add_look_arguments(parser)
    parser.add_argument(
        "--init", required=True, metavar="CHECKPOINT",
        help=f"{FORMATS}; random:CHECKPOINT (or random:PRESET) takes its shape and vocabulary and starts from random weights",
    )  # fmt: skip
    parser.add_argument("--vocabulary", metavar="PATH", help="a spiece.model or a folder with one; default: the checkpoint's")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; the same one continues it")
    add_verify_argument(parser)
    parser.epilog = f"{parser.epilog} The section model sets fields of the checkpoint's config."


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Fine-tunes, then shows predictions and writes the report; exit status 1 where a signal stopped the run before its end."""
    recipe, others = load_config(args), connection(args)
    check_look(args)
    if args.print_config:
        return print_config(recipe)
    start_jax(args)
    if args.dry_run:
        from flax_switch.data.tasks import prepare_tasks
        from flax_switch.workflows.start import open_start

        start = open_start(args.init, recipe.model, args.vocabulary)
        config = recipe.resolve(start.config, args.init)
        return dry_run(config, prepare_tasks(config.data, start.vocabulary, say=print, model=config.model))
    from flax_switch.parallel import processes
    from flax_switch.workflows.finetune import finetune
    from flax_switch.workflows.finish import finish_finetuning

    options = dict(init=args.init, vocabulary=args.vocabulary, profile=args.profile, verify=not args.no_verify)
    with processes.session(others):
        result = finetune(recipe, args.workdir, **options)
        if result.finished:
            finish_finetuning(result, args.workdir)
    return 0 if result.finished else 1
