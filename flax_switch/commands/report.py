"""flax-switch report WORKDIR"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The workdir."""
    parser.add_argument("workdir", help="of a run, finished or not")
    parser.add_argument("--output", metavar="FILE", help="default: WORKDIR/report.html")


def run(args: argparse.Namespace) -> int:
    """Writes the report and says where."""
    from flax_switch.workflows.report import write_report

    print(f"Report: {write_report(args.workdir, args.output)}")
    return 0
