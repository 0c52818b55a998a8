"""What the commands on checkpoints share: their arguments, and errors about missing extras."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from flax_switch.config import ConfigError
from flax_switch.config.values import parse_assignment
from flax_switch.config.weights import KERNELS

FORMATS = "a Hugging Face folder, a hub name (owner/model), a T5X checkpoint folder, a training run, or a folder of ours"


def add_source_arguments(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Adds the source and what is known about it."""
    parser.add_argument("source", metavar=metavar, help=FORMATS)
    parser.add_argument("--revision", help="of a model on the hub: a branch, tag or commit")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="set a field of the model's config: what a T5X checkpoint's shapes cannot tell, such as num_selected_experts=2",
    )  # fmt: skip
    parser.add_argument(
        "--allow-missing", action="append", default=[], metavar="NAME",
        help="forgive a tensor that is missing or left over; may hold * and be repeated",
    )  # fmt: skip
    add_verify_argument(parser)


def add_verify_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the switch that leaves checksums out."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare a run's checkpoint with its checksums first, which reads all of it"
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a model's weights are held in memory, and what is added to them."""
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16", "int8", "int4"), help="hold kernels in this form; default: the checkpoint's"
    )
    add_expert_arguments(parser)
    parser.add_argument("--adapter", metavar="PATH", help="for the model: a folder of PEFT's or ours, or a run (docs/lora.md)")


def add_expert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where experts are, and how quantised kernels are held."""
    parser.add_argument(
        "--experts", choices=("memory", "disk"), default="memory", help="disk: read only those that tokens hit (docs/offload.md)"
    )
    parser.add_argument("--expert-memory", metavar="SIZE", help="for experts on disk, such as 4GB (the default)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="hold int8 and int4 ones so (docs/quantisation.md)")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `load_pretrained` that say where experts are, and the adapter."""
    from flax_switch.pretrained.on_disk import expert_budget

    expert_budget(args.experts, args.expert_memory)  # raises for what cannot be, before anything is read
    return {"experts": args.experts, "expert_memory": args.expert_memory, "kernels": args.kernels, "adapter": args.adapter}


def loading_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the changes of a model's config that its form in memory asks for."""
    weights = {} if args.weights is None else {"weights": args.weights}
    return {**weights, "scan_layers": False} if args.experts == "disk" else weights


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says how the result is written."""
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DST")
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields set with --set."""
    return dict(parse_assignment(text, "--set takes FIELD=VALUE, such as num_selected_experts=2") for text in args.set)


def explain_missing_extras(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turns the ImportError of an optional dependency into one message; shows warnings, and what conversion says, each once."""

    @functools.wraps(run)
    def wrapped(args: argparse.Namespace) -> int:
        handler = logging.StreamHandler(sys.stderr)
        logger, told = logging.getLogger("flax_switch"), logging.getLogger("flax_switch.convert")
        before = logger.propagate, told.level
        logger.addHandler(handler)
        logger.propagate = False  # other libraries put handlers of their own at the root
        told.setLevel(logging.INFO)
        try:
            return run(args)
        except ImportError as error:
            raise ConfigError(str(error)) from error
        finally:
            logger.removeHandler(handler)
            logger.propagate, told.level = before

    return wrapped
