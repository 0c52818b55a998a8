"""flax-switch routing RUN [--output FILE] [--json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flax_switch.commands.checkpoints import explain_missing_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, and what is written."""
    parser.add_argument("run", metavar="RUN", help="the workdir of a pre-training run, finished or not")
    parser.add_argument("--output", metavar="FILE", help="an HTML page; default: RUN/routing.html")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and draw no page")


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Measures the routing of the run's checkpoints, prints a table and writes the page."""
    from flax_switch.host.files import check_writable
    from flax_switch.inspection.run_routing import follow, measure, render

    page = Path(args.output or Path(args.run) / "routing.html")
    if not args.json:
        check_writable(page, make_folders=True)
        check_writable(page.with_suffix(".png"), make_folders=True)
    routing = follow(args.run)
    measured = measure(routing)
    if args.json:
        print(json.dumps({"num_experts": routing.num_experts, "kinds": routing.kinds, "layers": measured}, indent=2))
        return 0
    from flax_switch.inspection.routing_page import write_page

    print(render(measured))
    print(f"Page: {write_page(routing, measured, page)}")
    return 0
