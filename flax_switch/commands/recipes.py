"""flax-switch recipes [NAME] [--json]"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from typing import Any

from flax_switch.commands.options import command_of
from flax_switch.config import one_of, recipes, shipped
from flax_switch.config.finetuning import FinetuneRecipe
from flax_switch.config.sizes import count_parameters, shorten

FIRST = "tiny"  # that a newcomer begins with
WIDTH = 100  # at most; on a narrower terminal its own
_KEY, _COMMAND = re.compile(r"(\w+: )?\s*"), re.compile(r"(\w+:)?\s*(flax-switch|python) ")


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
        print(json.dumps(_row(args.name), indent=1) if args.json else _told(shipped.describe(args.name).text))
        return 0
    rows = [_row(name) for name in sorted(shipped.names(), key=lambda name: name != FIRST)]
    told = _filled(
        f"Recipes, for --config NAME. Begin with {FIRST}; flax-switch recipes NAME tells all of one. In brackets: the "
        "parameters that a token uses.",
        "",
        "",
    )
    print(json.dumps(rows, indent=1) if args.json else "\n".join((told, "", *map(_shown, rows))))
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
    size = "of any size: --init names the model"
    if row["parameters"]:
        size = f"{shorten(row['parameters'])} parameters"
        used = row["active_parameters"]
        size += f" (a token: {shorten(used)})" if used < row["parameters"] else ""
    hardware = re.split(r"(?<=\.)\s", row["hardware"])[0]
    wrapped = (_filled(line, "    ", "    ") for line in (row["purpose"], f"Hardware: {hardware}"))
    return "\n".join((f"{row['name']:34} {row['command']:9} {size}", *wrapped))


def _told(docstring: str) -> str:
    """Returns a docstring with its prose wrapped anew; its commands can be copied, and name recipes, which need no file."""
    shown: list[str] = []
    prose: list[str] = []
    for line in [*re.sub(r"configs/(\w+)\.py", r"\1", docstring).splitlines(), ""]:
        command = _COMMAND.match(line)
        if prose and (command or not line or re.match(r"\w+: ", line)):
            column = _KEY.match(prose[0]).end()  # pyright: ignore[reportOptionalMemberAccess] - it matches anything
            words = " ".join([prose[0][column:], *(other.strip() for other in prose[1:])])
            shown.append(_filled(words, prose[0][:column], " " * column))
            prose = []
        if command or not line:
            shown.append(re.sub(r" {2,}(?=--)", f" \\\\\n{' ' * 15}", line))  # where the docstring had its line end
        else:
            prose.append(line)
    return "\n".join(shown).rstrip("\n")


def _filled(text: str, first: str, others: str) -> str:
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    options: Any = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, **options)
