"""One HTML file with its style, its script and its data inside; the colours that every picture of the package uses."""

import html
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LONGEST = 2000  # points of a curve: more than a screen shows
# Okabe and Ito's colours, which the colour-blind tell apart; beyond them experts repeat with another brightness.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
TRAINING, HELD_OUT = PALETTE[4], PALETTE[0]  # curves of a run, outside of its report
SHADES = (0.0, 0.45, -0.35, 0.7, -0.6)  # towards white where positive, towards black where negative

SCALE = '<div class="scale"><span>{low}</span><i></i><span>{high}</span></div>'  # of the maps below it


def page(title: str, body: str) -> str:
    """Returns a whole page; `body` is HTML."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>\n{style}</style></head>\n<body>\n{body}\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def text(value: Any) -> str:
    """Returns a value as text that HTML takes for nothing else."""
    return html.escape(str(value))


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns names with what they mean; the meanings are HTML, and pairs without one are left out."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{meaning}</dd>' for name, meaning in pairs if meaning)}</dl>"


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns figures, each with what it says below it."""
    made = (f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in pairs)
    return f'<div class="cards">{"".join(made)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Returns a table; cells are HTML, and a cell that begins with a tag `<td` is one already."""

    def cell(name: str, content: str) -> str:
        return content if content.startswith("<td") else f'<td data-name="{text(name)}">{content}</td>'

    names = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, head, row))}</tr>" for row in rows)
    top = f"<thead><tr>{names}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def curves(title: str, unit: str, series: Sequence[Mapping[str, Any]], *, wide: bool = False, **options: Any) -> str:
    """Returns a chart of curves, each {"name", "x", "y"} and perhaps "dash" or "points".

    options: `log` and `zero` for the axis, `top`, its upper end.
    """
    short = [{**one, **_thinned(one["x"], one["y"])} for one in series if len(one["x"])]
    return _figure(title, unit, {"title": title, "series": short, **options}, wide) if short else ""


def heat(title: str, row: str, rows: Sequence[str], x: Sequence[int], values: Sequence[Sequence[float]], **options: Any) -> str:
    """Returns a map of values [row][place in x], drawn from 0 to `high`.

    options: high, unit, `tall`, the pixels of a row, and `axis`, what x counts if not steps.
    """
    stride = -(-len(x) // 160)
    thin = [[_short(value) for value in line[::stride]] for line in values]
    return _figure(
        title, "", {"title": title, "row": row, "rows": list(rows), "x": list(x[::stride]), "values": thin, **options}, False
    )


def expert_color(expert: int) -> str:
    """Returns the colour of an expert as '#rrggbb'; 40 differ."""
    rgb = [int(PALETTE[expert % len(PALETTE)][i : i + 2], 16) for i in (1, 3, 5)]
    shade = SHADES[expert // len(PALETTE) % len(SHADES)]
    return "#" + "".join(f"{round(c + (255 - c) * shade if shade > 0 else c * (1 + shade)):02x}" for c in rgb)


def ink_on(color: str) -> str:
    """Returns black or white, whichever has more contrast on a colour (by WCAG's relative luminance)."""
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _figure(title: str, unit: str, chart: Mapping[str, Any], wide: bool) -> str:
    data = json.dumps(chart, separators=(",", ":")).replace("<", "\\u003c")
    name = f"chart-{zlib.crc32(data.encode()):08x}"
    unit = f' <span class="unit">{text(unit)}</span>' if unit else ""
    return (
        f'<figure class="card{" wide" if wide else ""}" data-chart="{name}"><h3>{text(title)}{unit}</h3>'
        f'<script type="application/json" id="{name}">{data}</script></figure>'
    )


def _thinned(x: Sequence[int], y: Sequence[float | None]) -> dict[str, list]:
    stride = -(-len(x) // LONGEST)
    kept = sorted({*range(0, len(x), stride), len(x) - 1})
    return {"x": [x[i] for i in kept], "y": [_short(y[i]) for i in kept]}


def _short(value: float | None) -> float | None:
    """Returns a figure with five digits; what is no number is not drawn."""
    return None if value is None or value != value or abs(value) == float("inf") else float(f"{value:.5g}")
