"""Runs a notebook's cells one after the other, as a kernel would, and reads its text as a page."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from documented.finding import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    """The texts of a notebook's cells of a kind, "code" or "markdown"."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_notebook(path: Path, folder: Path) -> dict[str, Any]:
    """Executes the code of a notebook in a folder; returns the names that it leaves."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for number, text in enumerate(cells(path, "code")):
            exec(compile(text, f"{path.name}, code cell {number}", "exec"), names)
    return names
