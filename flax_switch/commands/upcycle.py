"""flax-switch upcycle DENSE DST --num-experts 8 [--layout mixed] [--noise 0.01]"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import add_source_arguments, add_write_arguments, changes_of, explain_missing_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the dense model, the destination, and what the sparse one should look like."""
    add_source_arguments(parser, "DENSE")
    parser.add_argument("destination", metavar="DST", help="a new folder")
    parser.add_argument("--num-experts", type=int, required=True, metavar="E")
    parser.add_argument("--layout", default="mixed", help="which layers become sparse: mixed, bottom, middle or top")
    parser.add_argument("--num-sparse-encoder-layers", type=int, metavar="M", help="default: half of the layers")
    parser.add_argument("--num-sparse-decoder-layers", type=int, metavar="M", help="default: half of the layers")
    parser.add_argument("--noise", type=float, default=0.0, help="on each copy, relative to the kernel's standard deviation")
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the noise")
    parser.add_argument("--to", default="flax_switch", metavar="FORMAT", help="flax_switch (default) or huggingface")
    add_write_arguments(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Writes the upcycled model."""
    from flax_switch.convert.progress import progress_bar
    from flax_switch.convert.upcycle import upcycle

    with progress_bar("Upcycling", enabled=not args.no_progress) as callbacks:
        destination = upcycle(
            args.source,
            args.destination,
            num_experts=args.num_experts,
            sparse_layout=args.layout,
            num_sparse_encoder_layers=args.num_sparse_encoder_layers,
            num_sparse_decoder_layers=args.num_sparse_decoder_layers,
            noise=args.noise,
            seed=args.seed,
            to=args.to,
            changes=changes_of(args),
            allow_missing=args.allow_missing,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            revision=args.revision,
            verify=not args.no_verify,
            **callbacks,
        )
    print(f"Upcycled {args.source} to {destination}")
    return 0
