"""Finds every command and every Python block that recipes, README and docs print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
GIN_FILES = sorted((ROOT / "configs" / "gin").glob("*.gin"))

_WORDS = r"(flax-switch|python3?|bash|pip|echo|gcloud|mpirun|sbatch|srun|ssh|export|git|pytest|docker|kubectl|curl)"
_COMMAND = re.compile(rf"{_WORDS} ")
_SCRIPT = re.compile(r"^\s*(#!|export |for |while |wait$|\w+=|if )", re.MULTILINE)  # such a block is one command


class Command(NamedTuple):
    """What a reader would type, on one line where it is not a script, and where it first stands."""

    where: str
    text: str


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, and its indented ones as blocks without a language."""
    language, lines, start, before = None, [], 0, ""
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if language is None and fence:
            language, lines, start = fence[1], [], number + 1
        elif language == "indented" and not line.startswith("    "):
            yield Block(f"{_name(page)}:{start}", "", "\n".join(lines))
            language = None
        elif language not in (None, "indented") and fence:
            yield Block(f"{_name(page)}:{start}", language, "\n".join(lines))
            language = None
        elif language is None and line.startswith("    ") and not before:
            language, lines, start = "indented", [line[4:]], number
        elif language is not None:
            lines.append(line[4:] if language == "indented" else line)
        before = line.strip()


def python_blocks() -> list[Block]:
    """Every Python block of README and docs."""
    return [block for page in PAGES for block in blocks(page) if block.language == "python"]


def commands() -> list[Command]:
    """Every command, each once, with the first place it stands in."""
    found: dict[str, Command] = {}
    for command in (*_of_recipes(), *_of_gin_files(), *(c for page in PAGES for c in commands_of_page(page))):
        found.setdefault(command.text, command)
    return list(found.values())


def _of_recipes() -> Iterator[Command]:
    for path in RECIPES:
        docstring = path.read_text(encoding="utf-8").split('"""')[1]
        yield from _of_lines(docstring.replace("Command: ", "         "), _name(path), prose=True)


def _of_gin_files() -> Iterator[Command]:
    for path in GIN_FILES:
        comments = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        yield from _of_lines("\n".join(comments), _name(path), prose=True)


def commands_of_page(page: Path) -> Iterator[Command]:
    """The commands of a page: of its blocks, and of spans of code that begin with one."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        yield from commands_of_block(block)
    fenced = re.compile(r"```.*?```", re.DOTALL)
    flowing = fenced.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in re.finditer(r"`([^`]+)`", flowing):
        span = " ".join(match[1].split())
        if _COMMAND.match(span):
            yield Command(f"{_name(page)}:{flowing.count(chr(10), 0, match.start()) + 1}", span)


def commands_of_block(block: Block) -> Iterator[Command]:
    """The commands that a block prints."""
    if block.language in ("bash", "sh", "console", "shell") and _SCRIPT.search(block.text):
        yield Command(block.where, block.text)
    elif block.language in ("bash", "sh", "console", "shell"):
        yield from _of_lines(block.text, block.where, prose=False)
    elif block.language == "yaml":
        for listed in re.findall(r"command: \[(flax-switch.*)\]", block.text):
            yield Command(block.where, listed.replace(", ", " "))
    elif block.language == "":
        yield from _of_lines(block.text, block.where, prose=True)


def _of_lines(text: str, where: str, *, prose: bool) -> Iterator[Command]:
    """The commands among lines; ends of lines with a backslash are joined. Without prose every line must be one."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in joined.splitlines():
        line = line.strip().removeprefix("$ ")
        if _COMMAND.match(line):
            yield Command(where, re.sub(r"\s+# .*$", "", line))
        else:
            assert prose or not line or line.startswith("#"), f"{where}: {line!r} starts with no command that this test knows."


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
