"""What merge, prune and grow share: they write a model with another number of experts."""

from __future__ import annotations

import argparse
from typing import Any

from flax_switch.commands.checkpoints import add_source_arguments, add_write_arguments, changes_of
from flax_switch.commands.options import add_compile_cache_argument, start_jax
from flax_switch.config import check
from flax_switch.config.ranges import shown


def add_resize_arguments(parser: argparse.ArgumentParser, seed: str) -> None:
    """Adds the model, the destination, and how many experts there are to be."""
    add_source_arguments(parser, "SRC")
    parser.add_argument("destination", metavar="DST", help="a new folder")
    parser.add_argument("--num-experts", type=int, required=True, metavar="E", help="of each sparse layer of the new model")
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--to", default="flax_switch", metavar="FORMAT", help="flax_switch (default) or huggingface")
    add_write_arguments(parser)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the text by which experts are judged."""
    parser.add_argument(
        "--examples", metavar="FILE", help="records with texts and their targets; default: the held-out examples of the run SRC"
    )
    parser.add_argument("--inputs", default="inputs", metavar="FIELD", help="of the examples (default: inputs)")
    parser.add_argument("--targets", default="targets", metavar="FIELD", help="of the examples (default: targets)")
    parser.add_argument("--prefix", default="", help="before every input, such as 'summarize: '")
    parser.add_argument("--length", type=int, default=128, metavar="TOKENS", help="of inputs and of targets (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=32, help="of held-out text: one half decides, one judges (default: 32)")
    parser.add_argument(
        "--keep", default="usage", metavar="HOW", help="which experts are kept: those most used (usage), or random ones"
    )
    add_compile_cache_argument(parser)


def resize_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `workflows.regroup` takes beside source and destination."""
    check(0 <= args.seed < 2**32, f"--seed must lie in [0, {2**32}); it is {shown(args.seed)}.")
    return dict(
        num_experts=args.num_experts, seed=args.seed, to=args.to, changes=changes_of(args), allow_missing=args.allow_missing,
        revision=args.revision, verify=not args.no_verify, max_shard_size=args.max_shard_size, overwrite=args.overwrite,
    )  # fmt: skip


def make_fewer(args: argparse.Namespace, merge: bool) -> int:
    """Merges or prunes, and prints what it cost."""
    from flax_switch.config.finetuning import FinetuneDataConfig

    check(2 <= args.batches <= 2**20, f"--batches must lie in [2, {2**20}]; it is {shown(args.batches)}.")
    examples = None
    if args.examples is not None:
        examples = FinetuneDataConfig(
            name="examples", validation=args.examples, inputs=args.inputs, targets=args.targets, prefix=args.prefix,
            inputs_length=args.length, targets_length=args.length, batch_size=args.batch_size,
        )  # fmt: skip
    start_jax(args)
    from flax_switch.convert.progress import progress_bar
    from flax_switch.workflows.regroup import fewer

    doing = "Merging" if merge else "Pruning"
    options: dict[str, Any] = dict(resize_options(args), merge=merge, keep=args.keep, examples=examples, batches=args.batches)
    with progress_bar(doing, enabled=not args.no_progress) as callbacks:
        made = fewer(args.source, args.destination, **{**options, **callbacks})
    assert made.before is not None and made.after is not None
    print(
        f"{doing} left {args.num_experts} experts a layer of {args.source} in {made.path}.\n"
        f"Cross-entropy on held-out text: {made.before:.4f} nats a token before, {made.after:.4f} after "
        f"({made.after - made.before:+.4f}). Fine-tune it with --init {made.path}."
    )
    return 0
