"""Every field of a config and every control, by group, with its default and what its comment says: for --help and completion."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

_LINE = re.compile(r"^    (\w+): (.*)$")
_GROUP = re.compile(r"^    # --- (.*)$")


class Described(NamedTuple):
    """A field: its group (a heading in the class, or ''), name, default and comment."""

    group: str
    name: str
    default: Any
    comment: str
    is_bool: bool


def described(section: type) -> list[Described]:
    """Returns the fields of a dataclass, in order; comments are read in its source and its bases'."""
    comments: dict[str, tuple[str, str]] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(_comments(base))
    found = []
    for field in dataclasses.fields(section):
        default = field.default if field.default is not dataclasses.MISSING else None
        group, comment = comments.get(field.name, ("", ""))
        found.append(Described(group, field.name, default, comment, field.type in ("bool", bool)))
    return found


def _comments(base: type) -> Iterator[tuple[str, tuple[str, str]]]:
    try:
        lines = inspect.getsource(base).splitlines()
    except OSError:  # a package without its source
        return
    group, above = "", ""
    for line in lines:
        found = _LINE.match(line)
        if found:
            yield found.group(1), (group, found.group(2).partition("  # ")[2] or above)
        if heading := _GROUP.match(line):
            group = heading.group(1).partition(";")[0]
            above = ""
        else:
            above = f"{above} {line[6:]}".strip() if line.startswith("    # ") else ""


def listing(title: str, fields: list[Described], spell: str) -> str:
    """Returns fields as lines for --help, wrapped at words: option, default, what it means. spell: '--config.train.{name}'."""
    width = max(60, min(shutil.get_terminal_size().columns, 132))
    lines, group = [f"\n{title}:"], ""
    for field in fields:
        if field.group != group:
            group = field.group
            lines.append(f"  {group}:")
        option = spell.format(name=field.name)
        about = f"{field.comment} (default: {_shown(field.default)})" if field.comment else f"(default: {_shown(field.default)})"
        if len(option) < 28:
            first, rest = f"    {option:28}", " " * 32
            lines.append(textwrap.fill(about, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False))
        else:
            lines += [f"    {option}", textwrap.fill(about, width, initial_indent=" " * 32, subsequent_indent=" " * 32)]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "''" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
