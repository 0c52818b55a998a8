"""flax-switch finetune --config configs/finetune_summarization.py --init CHECKPOINT --workdir DIR [--config.data.train=FILE ...]"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import FORMATS, explain_missing_extras
from flax_switch.commands.look import dry_run
from flax_switch.commands.options import load_config, take_overrides
from flax_switch.commands.training import add_training_arguments, train_as_told
from flax_switch.config.finetuning import FinetuneRecipe

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds recipe, overrides, what to start from, and workdir."""
    add_training_arguments(parser, "finetuning")
    parser.add_argument(
        "--init", required=True, metavar="CHECKPOINT",
        help=f"{FORMATS}; random:CHECKPOINT (or random:PRESET) takes its shape and vocabulary and starts from random weights",
    )  # fmt: skip
    parser.add_argument("--vocabulary", metavar="PATH", help="a spiece.model or a folder with one; default: the checkpoint's")
    parser.epilog = f"{parser.epilog} The section model sets fields of the checkpoint's config."


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Fine-tunes, then shows predictions and writes the report; exit status 1 where a signal stopped the run before its end."""
    recipe = load_config(args)
    return train_as_told(args, recipe, lambda: _look(args, recipe), lambda: _train(args, recipe))


def _look(args: argparse.Namespace, recipe: FinetuneRecipe) -> int:
    from flax_switch.data.tasks import prepare_tasks
    from flax_switch.workflows.start import open_start

    start = open_start(args.init, recipe.model, args.vocabulary)
    config = recipe.resolve(start.config, args.init)
    return dry_run(config, prepare_tasks(config.data, start.vocabulary, say=print, model=config.model))


def _train(args: argparse.Namespace, recipe: FinetuneRecipe) -> bool:
    from flax_switch.workflows.finetune import finetune
    from flax_switch.workflows.finish import finish_finetuning

    options = dict(init=args.init, vocabulary=args.vocabulary, profile=args.profile, verify=not args.no_verify)
    result = finetune(recipe, args.workdir, **options)
    if result.finished:
        finish_finetuning(result, args.workdir)
    return result.finished
