"""Pictures by matplotlib, in the style of the pages; the one place that imports it."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from flax_switch.config import check
from flax_switch.pages.page import PALETTE

STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#5b6676", "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.labelcolor": "#5b6676",
    "axes.prop_cycle": f"cycler(color={list(PALETTE)})", "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 10, "axes.titleweight": "semibold", "font.size": 9, "grid.color": "#e2e6ec", "image.cmap": "cividis",
    "legend.frameon": False, "savefig.dpi": 130, "text.color": "#1b2330", "xtick.color": "#5b6676", "ytick.color": "#5b6676",
}  # fmt: skip


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Yields an empty figure of so many inches; what is drawn into it inside the block has the package's style."""
    check(importlib.util.find_spec("matplotlib") is not None, "Pictures need matplotlib: pip install 'flax_switch[plots]'.")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")
