"""A curve in a notebook that grows while a run goes on; elsewhere there is none."""

import html
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flax_switch.pages.page import HELD_OUT, TRAINING

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 44, 24
STYLES = {"train": (TRAINING, "training"), "eval": (HELD_OUT, "held-out")}  # kind of line -> colour, what it is called


def notebook_display() -> Any:
    """Returns what shows things in the notebook whose kernel this process is, or None."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()  # a kernel has imported it
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return importlib.import_module("IPython.display").display


class LiveCurve:
    """The cross-entropy of a run's lines, drawn anew with each; `_repr_html_` is what a notebook shows."""

    def __init__(self, display: Any) -> None:
        """Takes IPython's `display`, or what has its interface."""
        self._display, self._handle = display, None
        self.points: dict[str, list[tuple[int, float]]] = {kind: [] for kind in STYLES}

    def add(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Draws a line of the metrics; those without a cross-entropy change nothing."""
        value = metrics.get("cross_entropy")
        if kind not in self.points or not isinstance(value, float) or value != value:
            return
        self.points[kind].append((step, value))
        if self._handle is None:
            self._handle = self._display(self, display_id=True)
        else:
            self._handle.update(self)

    def _repr_html_(self) -> str:
        return draw(self.points)


def draw(points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Returns curves of (step, nats per token) as an SVG picture with its axes' ends and the last values."""
    steps = [step for line in points.values() for step, _ in line]
    values = [value for line in points.values() for _, value in line]
    if not steps:
        return ""
    low, high, last = min(values), max(values), max(steps)

    def place(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step / last if last else 0.0)
        y = 8 + (HEIGHT - BOTTOM - 16) * ((high - value) / (high - low) if high > low else 0.5)
        return f"{x:.1f},{y:.1f}"

    shapes, legend = [], []
    for kind, (colour, name) in STYLES.items():
        line = points.get(kind, ())
        if line:
            path = " ".join(place(*point) for point in line)
            shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            x, y = place(*line[-1]).split(",")
            shapes.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
            legend.append(f'<tspan fill="{colour}">{html.escape(name)} {line[-1][1]:.3f}</tspan>')
    texts = (
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{high:.2f}</text>'
        f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM - 4}" text-anchor="end">{low:.2f}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last:,}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">nats per token: {", ".join(legend)}</text>'
    )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="11" fill="currentColor">{"".join(shapes)}{texts}</svg>'
