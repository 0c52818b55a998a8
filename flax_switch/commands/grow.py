"""flax-switch grow SRC DST --num-experts 32 [--router-noise 1e-6]"""

from __future__ import annotations

import argparse
from typing import Any

from flax_switch.commands.checkpoints import explain_missing_extras
from flax_switch.commands.experts import add_resize_arguments, resize_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the destination and what decides between copies."""
    add_resize_arguments(parser, "of the noise")
    parser.add_argument(
        "--router-noise", type=float, default=1e-6, metavar="SIZE",
        help="relative to the router's columns; decides which copy of an expert a token goes to (default: 1e-6)",
    )  # fmt: skip


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Writes the model with more experts."""
    from flax_switch.convert.progress import progress_bar
    from flax_switch.workflows.regroup import more

    options: dict[str, Any] = dict(resize_options(args), router_noise=args.router_noise)
    with progress_bar("Growing", enabled=not args.no_progress) as callbacks:
        made = more(args.source, args.destination, **{**options, **callbacks})
    print(f"Grew {args.source} to {args.num_experts} experts a layer in {made.path}: the same function, with room for every token.")
    return 0
