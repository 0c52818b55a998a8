"""flax-switch export RUN OUT --to stablehlo|onnx|ctranslate2|gguf-ready"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import add_source_arguments, changes_of, explain_missing_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds source, destination and format."""
    add_source_arguments(parser, "MODEL")
    parser.add_argument("destination", metavar="OUT", help="a new folder; it appears when the export is complete")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="stablehlo, onnx, ctranslate2 or gguf-ready (docs/export.md)")
    parser.add_argument(
        "--platform", action="append", dest="platforms", metavar="NAME",
        help="of stablehlo: cpu, cuda or tpu; repeatable (default: one program for all three)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT")
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Exports a checkpoint and says where it is."""
    from flax_switch.convert.progress import progress_bar
    from flax_switch.export.folder import export
    from flax_switch.export.stablehlo import PLATFORMS

    with progress_bar("Exporting", enabled=not args.no_progress) as callbacks:
        destination = export(
            args.source,
            args.destination,
            to=args.to,
            platforms=args.platforms or PLATFORMS,
            changes=changes_of(args),
            allow_missing=args.allow_missing,
            revision=args.revision,
            verify=not args.no_verify,
            overwrite=args.overwrite,
            **callbacks,
        )
    print(f"Exported {args.source} to {destination}")
    return 0
