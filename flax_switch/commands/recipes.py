"""flax-switch recipes [NAME] [--json]"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from typing import Any

from flax_switch.commands.options import command_of
from flax_switch.config import one_of, recipes, shipped
from flax_switch.config.finetuning import FinetuneRecipe
from flax_switch.config.sizes import count_parameters, shorten

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a name, and how to print."""
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="say all that this one's docstring says: command, hardware, what to expect"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = "Run one with flax-switch COMMAND --config NAME, or --gin-file NAME: gin files of the same names come with it."


def run(args: argparse.Namespace) -> int:
    """Prints the recipes that come with the package, or the docstring of one."""
    if args.name is not None:
        one_of("NAME", args.name, tuple(shipped.names()))
        print(json.dumps(_row(args.name), indent=1) if args.json else shipped.describe(args.name).text)
        return 0
    rows = [_row(name) for name in shipped.names()]
    print(json.dumps(rows, indent=1) if args.json else "\n".join(_shown(row) for row in rows))
    return 0


def _row(name: str) -> dict[str, Any]:
    """Returns what there is to say of a recipe: of its docstring, and of the model in its config."""
    config, told = recipes.load_recipe(name), shipped.describe(name)
    size = None if isinstance(config, FinetuneRecipe) else count_parameters(config.model)
    return {
        "name": name,
        "command": command_of(config),
        "purpose": told.purpose,
        "parameters": size and size.total,
        "active_parameters": size and size.active,
        "hardware": told.hardware,
    }


def _shown(row: dict[str, Any]) -> str:
    size = "the checkpoint's parameters"
    if row["parameters"]:
        size = f"{shorten(row['parameters'])} parameters, {shorten(row['active_parameters'])} active per token"
    hardware = re.split(r"(?<=\.)\s", row["hardware"])[0]
    lines = (row["purpose"], f"Hardware: {hardware}")
    wrapped = (textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="    ") for line in lines)
    return "\n".join((f"{row['name']:34} {row['command']:9} {size}", *wrapped))
