"""The recipes that come with the package, by name: where their files are, and what their docstrings say of them.

A wheel holds them as `flax_switch.configs`; in a checkout, and so in an editable install, they lie beside the package in configs/.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from pathlib import Path

from flax_switch.config import ConfigError

LISTED = "`flax-switch recipes` lists those that come with the package."
_PACKAGE = Path(__file__).parents[1]
_FIRST = "tiny"  # every installation that has recipes has this one


def folder() -> Path:
    """Returns the folder of the recipes; their gin files are in `gin` inside it."""
    for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (place / f"{_FIRST}.py").is_file():
            return place
    raise ConfigError(
        f"The recipes are not where this installation should have them ({_PACKAGE / 'configs'}); install flax_switch again, or "
        "name a recipe by its path."
    )


def names() -> list[str]:
    """Returns the recipes' names, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find(given: str | Path, suffix: str = ".py") -> Path:
    """Returns the file of a recipe (`suffix` .py) or gin file (.gin), by its path or, where it comes with the package, its name.

    A name is a word without suffix or folder: `tiny` is the package's, ./tiny or tiny.py a file of yours.

    Raises:
      ConfigError: if there is none; it suggests the nearest.
    """
    path = Path(given)
    if str(given) == path.name and (known := _file(path.name, suffix)).is_file():
        return known
    if path.is_file():
        return path
    raise ConfigError(f"There is no {'recipe' if suffix == '.py' else 'gin file'} {given}{_suggestion(path, suffix)} {LISTED}")


def holds(path: Path) -> bool:
    """Returns whether a file is one of those that come with the package."""
    return path.resolve().is_relative_to(folder().resolve())


def _file(name: str, suffix: str) -> Path:
    return folder() / f"{name}.py" if suffix == ".py" else folder() / "gin" / f"{name}.gin"


def _suggestion(path: Path, suffix: str) -> str:
    """Returns what follows the path that is not there: the nearest file beside it, or the nearest name."""
    option = "--config" if suffix == ".py" else "--gin-file"
    beside = sorted(p.stem for p in path.parent.glob(f"*{suffix}")) if path.parent.is_dir() else []
    bare = str(path) == path.name and not path.suffix
    if not bare and (near := difflib.get_close_matches(path.stem, beside, n=1)):
        return f". Did you mean {path.parent / near[0]}{suffix}?"
    if not bare and path.stem in names():
        return f" here. The one that comes with the package is {option} {path.stem}."
    if near := difflib.get_close_matches(path.stem, names(), n=1):
        return f". Did you mean {option} {near[0]}?"
    return "."


@dataclasses.dataclass(frozen=True)
class Description:
    """What a recipe's docstring says."""

    name: str
    purpose: str  # its first sentence
    hardware: str
    text: str  # all of it


def describe(name: str) -> Description:
    """Reads the docstring of a recipe that comes with the package; nothing of it is run."""
    text = ast.get_docstring(ast.parse(find(name).read_text(encoding="utf-8"))) or ""
    hardware = re.search(r"^Hardware:(.*(?:\n[ \t]+.*)*)", text, re.M)
    return Description(name, text.partition("\n")[0], " ".join(hardware.group(1).split()) if hardware else "", text)
