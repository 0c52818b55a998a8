"""The page that a server shows: one file with the style of every page of the package."""

from __future__ import annotations

import functools
from pathlib import Path

from flax_switch.pages.page import expert_color, ink_on, page


@functools.cache
def read_page() -> str:
    """Returns the page."""
    return page("flax_switch", (Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def chip_colors(experts: int) -> list[tuple[str, str]]:
    """Returns the colour of each expert, and of text on it."""
    return [(expert_color(expert), ink_on(expert_color(expert))) for expert in range(experts)]
