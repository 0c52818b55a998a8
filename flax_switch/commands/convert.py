"""flax-switch convert SRC DST --to huggingface|flax_switch|t5x [--dtype bfloat16] [--max-shard-size 5GB]"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from flax_switch.commands.checkpoints import add_source_arguments, add_write_arguments, changes_of, explain_missing_extras
from flax_switch.commands.options import tell
from flax_switch.config import ConfigError, check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds source, destination and form."""
    add_source_arguments(parser, "SRC")
    parser.add_argument("destination", metavar="DST", help="a new folder; it appears when the conversion is complete")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="huggingface, flax_switch or t5x")
    parser.add_argument("--dtype", help="of the written tensors: float32, bfloat16 or float16; routers keep theirs")
    parser.add_argument(
        "--weights", metavar="FORM", help="of kernels alone: int8, int4, bfloat16 or float16; --dtype is of all else"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="for --weights int4: round for these texts, lines or JSON lines (docs/quantisation.md)",
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="of the calibration's JSON lines (default: text)")
    parser.add_argument(
        "--expert-capacity", type=int, metavar="C", help="tokens an expert takes of a sequence, where Hugging Face must be told"
    )
    parser.add_argument("--base", metavar="MODEL", help="where SRC is an adapter, the model that it is for (docs/lora.md)")
    parser.add_argument("--merge", action="store_true", help="write that model, with the adapter made part of its kernels")
    add_write_arguments(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Converts; running an interrupted conversion again finishes it."""
    from flax_switch.convert.checkpoint import convert
    from flax_switch.convert.progress import progress_bar

    if args.base is not None:
        return _convert_adapter(args)
    check(not args.merge, "--merge makes one model of an adapter and its model: name that with --base.")
    changes = changes_of(args)
    if args.expert_capacity is not None:
        changes["expert_capacity"] = args.expert_capacity
    if args.weights is not None:
        changes["weights"] = args.weights
    make = convert if args.calibration is None else _calibrated(args)
    with progress_bar("Converting", enabled=not args.no_progress) as callbacks:
        destination = make(
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


def _calibrated(args: argparse.Namespace) -> Callable[..., Path]:
    """Returns what converts as `convert` does, by the texts of a file."""
    from flax_switch.generation.text import read_lines

    check(args.weights == "int4", "--calibration is for --weights int4, of which rounding takes the most; leave it out.")
    try:
        lines = read_lines(Path(args.calibration).read_bytes().splitlines(), args.field)
    except OSError as error:
        raise ConfigError(f"Cannot read the calibration {args.calibration}: {error}.") from error
    for line in lines:
        check(line.error is None, f"{args.calibration}, line {line.number}: {line.error}.")
    check(bool(lines), f"{args.calibration} holds no text; write some hundred lines like those that the model will be given.")
    tell(f"Rounding for {len(lines)} texts, which the model answers first.")
    from flax_switch.workflows.calibrate import convert_calibrated

    return lambda source, destination, **options: convert_calibrated(source, destination, [line.text for line in lines], **options)


def _convert_adapter(args: argparse.Namespace) -> int:
    from flax_switch.convert.adapter_folder import convert_adapter
    from flax_switch.convert.progress import progress_bar

    check(
        not (args.set or args.allow_missing or args.weights or args.expert_capacity or args.calibration),
        "--set, --allow-missing, --weights, --calibration and --expert-capacity are for whole models; convert the merged model "
        "once more.",
    )
    with progress_bar("Converting", enabled=args.merge and not args.no_progress) as callbacks:
        destination = convert_adapter(
            args.source,
            args.destination,
            args.base,
            to=args.to,
            merge=args.merge,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            revision=args.revision,
            verify=not args.no_verify,
            **callbacks,
        )
    print(f"{'Merged' if args.merge else 'Converted'} {args.source} {'into' if args.merge else 'to'} {destination}")
    return 0
