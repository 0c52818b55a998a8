"""Every picture of the package has one style: its colours are named in one place, and matplotlib's figures are made in one."""

import re
from pathlib import Path

from flax_switch.pages.page import PALETTE
from flax_switch.pages.plots import drawing

PACKAGE = Path(__file__).parents[2] / "flax_switch"


def test_colours_and_figures_come_from_pages():
    others = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "pages"]
    found = {
        path.name: re.findall(
            r"""["'#]#?[0-9a-fA-F]{6}["'; ]|matplotlib.pyplot|Figure\(|cmap=["']""", path.read_text(encoding="utf-8")
        )
        for path in others
    }
    assert len(found) > 100 and {path: words for path, words in found.items() if words} == {}


def test_curves_take_the_palette_in_turn_and_maps_one_that_the_colour_blind_can_read():
    with drawing(3, 2) as figure:
        curves, values = figure.subplots(1, 2)
        lines = [curves.plot([0, 1], [i, 2 * i])[0].get_color() for i in range(3)]
        assert values.imshow([[0.0, 1.0]]).get_cmap().name == "cividis"
    assert lines == list(PALETTE[:3])
    assert not curves.spines["top"].get_visible()
