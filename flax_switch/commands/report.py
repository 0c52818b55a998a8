"""flax-switch report WORKDIR [WORKDIR ...] [--output FILE] [--open]"""

from __future__ import annotations

import argparse

from flax_switch.commands.options import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the workdirs, and where the page goes."""
    parser.add_argument(
        "workdir", metavar="WORKDIR", nargs="+", help="a run's folder, finished or not; several are compared on one page"
    )
    parser.add_argument("--output", metavar="FILE", help="default: WORKDIR/report.html; of several runs, comparison.html")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")


def run(args: argparse.Namespace) -> int:
    """Writes the report and says where."""
    from flax_switch.workflows.report import compare_runs, write_report

    if len(args.workdir) == 1:
        path = write_report(args.workdir[0], args.output)
    else:
        path = compare_runs(args.workdir, args.output or "comparison.html")
    print(f"Report: {path}")
    if args.open:
        show(path)
    return 0
