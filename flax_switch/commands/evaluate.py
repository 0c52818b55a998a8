"""flax-switch evaluate --checkpoint CHECKPOINT --config RECIPE --config.data.validation=FILE [--output DIR]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.commands.checkpoints import (
    FORMATS,
    add_loading_arguments,
    add_verify_argument,
    explain_missing_extras,
    loading_changes,
    loading_options,
)
from flax_switch.commands.options import (
    add_compile_cache_argument,
    add_distributed_arguments,
    add_recipe_arguments,
    connection,
    load_config,
    start_jax,
    take_overrides,
)
from flax_switch.config import ConfigError

if TYPE_CHECKING:
    from flax_switch.config.finetuning import FinetuneRecipe
    from flax_switch.training.state import Run
    from flax_switch.workflows.predictions import Prediction

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds checkpoint, recipe, overrides, and where results go."""
    add_recipe_arguments(parser, "finetuning", without="optimizer")
    add_distributed_arguments(parser)
    add_compile_cache_argument(parser)
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help=FORMATS)
    parser.add_argument("--vocabulary", metavar="PATH", help="a spiece.model or a folder with one; default: the checkpoint's")
    add_loading_arguments(parser)
    add_verify_argument(parser)
    parser.add_argument("--output", default="evaluation", metavar="DIR", help="for metrics.json and predictions.jsonl")
    parser.epilog = f"{parser.epilog} Without --config, a fine-tuned run's own recipe is used, and --config.… changes it."


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Prints the scores, and writes them and the predictions; of several processes the first does."""
    others, recipe = connection(args), _recipe(args)
    if others is None:
        _check_output(args, recipe)
    loading = loading_options(args)
    start_jax(args)
    import jax

    from flax_switch.parallel import processes
    from flax_switch.workflows.finetune import evaluate_checkpoint

    options = dict(vocabulary=args.vocabulary, verify=not args.no_verify, changes=loading_changes(args), **loading)
    with processes.session(others):
        first = jax.process_index() == 0
        if first and others is not None:
            _check_output(args, recipe)
        found = evaluate_checkpoint(recipe, args.checkpoint, **options)
        if first:
            _write(Path(args.output), *found)
    return 0


def _check_output(args: argparse.Namespace, recipe: FinetuneRecipe) -> None:
    """Raises `ConfigError` for an output that cannot be written, or that is what is read."""
    from flax_switch.host.files import check_writable

    examples = [task.validation or task.train or () for task in recipe.data.mixture]
    read = [name for names in examples for name in ([names] if isinstance(names, str) else names)]
    check_writable(Path(args.output) / "metrics.json", make_folders=True)
    check_writable(Path(args.output) / "predictions.jsonl", reads=read, make_folders=True)


def _write(output: Path, run: Run, evaluation: dict[str, Any], predictions: list[Prediction]) -> None:
    """Writes and prints what an evaluation found."""
    from etils import epath

    from flax_switch.host.files import write_text
    from flax_switch.workflows.predictions import describe, finetuning_config, write_predictions

    write_text(output / "metrics.json", json.dumps(evaluation, indent=2) + "\n")
    write_predictions(epath.Path(output) / "predictions.jsonl", predictions)
    config = finetuning_config(run)
    print(describe(config, evaluation))
    asked = config.evaluation.max_examples
    of = "all there are" if asked is None else f"{asked:,} of each task asked for"
    print(
        f"Scores over {len(predictions):,} examples ({of}), the loss over train.eval_batches={config.train.eval_batches} batches."
    )
    print(f"Metrics and predictions: {output}")


def _recipe(args: argparse.Namespace) -> FinetuneRecipe:
    """Returns the recipe that was named, or that of the run the checkpoint belongs to."""
    if args.config or args.gin_file:
        return load_config(args)
    from flax_switch.config import recipes
    from flax_switch.config.finetuning import FinetuneConfig, FinetuneRecipe
    from flax_switch.training.checkpoint import CONFIG_FILE, read_config
    from flax_switch.workflows.finetune import recipe_of

    if args.bindings:
        raise ConfigError("--gin.… binds fields of a --gin-file; without one use --config.SECTION.FIELD=VALUE.")
    named = [Path(name) for name in (args.adapter, args.checkpoint) if name]
    for folder in (place for path in named for place in (path, path.parent)):
        if (folder / CONFIG_FILE).is_file() and (folder / "checkpoints").is_dir():
            config = read_config(folder)
            if isinstance(config, FinetuneConfig):
                values = recipes.override(recipes.to_config_dict(recipe_of(config)), args.overrides)
                found = recipes.from_config_dict(values)
                assert isinstance(found, FinetuneRecipe)
                return found
    raise ConfigError(
        f"{args.checkpoint} is no fine-tuned run that could say how to evaluate; name a recipe: --config finetune_summarization."
    )
