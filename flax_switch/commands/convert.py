"""flax-switch convert SRC DST --to huggingface|flax_switch [--dtype bfloat16] [--max-shard-size 5GB]"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import add_source_arguments, add_write_arguments, changes_of, explain_missing_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds source, destination and form."""
    add_source_arguments(parser, "SRC")
    parser.add_argument("destination", metavar="DST", help="a new folder; it appears when the conversion is complete")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="huggingface or flax_switch")
    parser.add_argument("--dtype", help="of the written tensors: float32, bfloat16 or float16; routers keep theirs")
    parser.add_argument(
        "--weights", metavar="FORM", help="of kernels alone: int8, int4, bfloat16 or float16; --dtype is of all else"
    )
    parser.add_argument(
        "--expert-capacity", type=int, metavar="C", help="tokens an expert takes of a sequence, where Hugging Face must be told"
    )
    add_write_arguments(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Converts; running an interrupted conversion again finishes it."""
    from flax_switch.convert.checkpoint import convert
    from flax_switch.convert.progress import progress_bar

    changes = changes_of(args)
    if args.expert_capacity is not None:
        changes["expert_capacity"] = args.expert_capacity
    if args.weights is not None:
        changes["weights"] = args.weights
    with progress_bar("Converting", enabled=not args.no_progress) as callbacks:
        destination = convert(
            args.source,
            args.destination,
            to=args.to,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            changes=changes,
            allow_missing=args.allow_missing,
            overwrite=args.overwrite,
            revision=args.revision,
            verify=not args.no_verify,
            **callbacks,
        )
    print(f"Converted {args.source} to {destination}")
    return 0
