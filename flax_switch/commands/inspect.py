"""flax-switch inspect PATH [--json], or PATH --text TEXT ... [--target TEXT ...] [--plot FILE] to look at routing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from flax_switch.commands.checkpoints import (
    add_loading_arguments,
    add_source_arguments,
    changes_of,
    explain_missing_extras,
    loading_changes,
    loading_options,
)
from flax_switch.commands.options import add_compile_cache_argument, show, start_jax, tell
from flax_switch.config import ConfigError, check, one_of
from flax_switch.host.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, and how to print."""
    add_source_arguments(parser, "PATH")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--text", action="append", default=[], help="load the model and show which expert takes each token of this text; repeatable"
    )
    parser.add_argument(
        "--target", action="append", help="what to feed the decoder, one for each --text (default: the model's answer)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="with --text: draw the routing, too: .html is a page, .png, .pdf and .svg a picture"
    )
    parser.add_argument("--open", action="store_true", help="show what --plot wrote in a browser")
    add_loading_arguments(parser)
    add_compile_cache_argument(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Prints format, config, parameter counts, dtypes, shapes and experts; loads no weights unless there is a --text."""
    if args.text:
        return _show_routing(args)
    if args.target or args.plot or args.open:
        raise ConfigError("--target and --plot show how a text is routed; give a --text.")
    check(
        args.experts == "memory" and not args.expert_memory and args.kernels == "auto" and not args.adapter,
        "--experts disk, --kernels and --adapter are for running the model; give a --text.",
    )
    from flax_switch.inspection.adapter import describe_adapter, render_adapter
    from flax_switch.inspection.checkpoint import describe, render

    if (adapter := describe_adapter(args.source)) is not None:
        print(json.dumps(adapter.to_dict(), indent=2) if args.json else render_adapter(adapter))
        return 0
    options = dict(allow_missing=args.allow_missing, revision=args.revision, verify=not args.no_verify)
    description = describe(args.source, changes={**changes_of(args), **loading_changes(args)}, **options)
    print(json.dumps(description.to_dict(), indent=2) if args.json else render(description))
    return 0


def _show_routing(args: argparse.Namespace) -> int:
    from flax_switch.inspection.page import write_page
    from flax_switch.inspection.routing import explore, plot, render
    from flax_switch.pretrained import load_pretrained

    check(args.plot or not args.open, "--open shows what --plot FILE writes; name a file, such as --plot routing.html.")
    if args.plot:
        one_of("The ending of a plot", Path(args.plot).suffix, (".html", ".png", ".pdf", ".svg"))
        check_writable(args.plot, make_folders=True)
    options = {**changes_of(args), **loading_changes(args), **loading_options(args)}
    start_jax(args)
    pretrained = load_pretrained(
        args.source, allow_missing=args.allow_missing, revision=args.revision, verify=not args.no_verify, **options
    )
    exploration = explore(pretrained, args.text, args.target)
    if args.json:
        texts = [[dataclasses.asdict(stack) for stack in stacks] for stacks in exploration.texts]
        print(json.dumps({"num_experts": exploration.config.num_experts, "texts": texts}, indent=2))
    else:
        print(render(exploration))
    if pretrained.expert_reads is not None:
        tell(str(pretrained.expert_reads))
    if args.plot:
        draw = write_page if args.plot.endswith((".html", ".htm")) else plot
        print(f"Wrote {draw(exploration, args.plot)}", file=sys.stderr)
    if args.open:
        show(args.plot)
    return 0
