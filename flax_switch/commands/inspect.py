"""flax-switch inspect PATH [--json]"""

from __future__ import annotations

import argparse
import json

from flax_switch.commands.checkpoints import add_source_arguments, changes_of, missing_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and how to print."""
    add_source_arguments(parser, "PATH")
    parser.add_argument("--json", action="store_true", help="print JSON")


@missing_extra
def run(args: argparse.Namespace) -> int:
    """Prints format, config, parameter counts, dtypes, shapes and experts; loads no weights."""
    from flax_switch.convert.inspect import describe, render

    description = describe(args.source, changes=changes_of(args), allow_missing=args.allow_missing, revision=args.revision)
    print(json.dumps(description.to_dict(), indent=2) if args.json else render(description))
    return 0
