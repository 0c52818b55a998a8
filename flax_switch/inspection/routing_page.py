"""The routing of a run as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import check
from flax_switch.host.files import write_bytes, write_text
from flax_switch.inspection import specialisation
from flax_switch.inspection.run_routing import RunRouting

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; } td, th { padding: .1rem .8rem .1rem 0; text-align: left; }
code { background: #f1f1f1; padding: 0 .2em; margin-right: .3em; }
"""
_EXPLAINED = (
    "Held-out text through every checkpoint of the run. Saturation is the share of the last checkpoint's choices that were made "
    "then already. Bits are what a token, or the kind of document it is from, says about its expert (mutual information, what "
    "chance would give taken off). How often the next sparse layer's expert is guessed stands beside how often it is without."
)


def write_page(routing: RunRouting, measured: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Writes the page, and its picture as a PNG of the same name beside it. Needs the extra `plots`."""
    path = Path(path)
    png = draw(routing, measured)
    write_bytes(path.with_suffix(".png"), png)
    liked = "".join(
        f"<h3>{name}</h3><table>"
        + "".join(
            f"<tr><td>{expert}</td><td>{share:.0%}</td><td>{''.join(f'<code>{html.escape(t)}</code>' for t in tokens)}</td></tr>"
            for expert, (share, tokens) in enumerate(zip(found["share"], found["likes"], strict=True))
        )
        + "</table>"
        for name, found in measured.items()
    )
    write_text(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Routing</title><style>{_STYLE}</style><h1>Routing</h1>"
        f"<p>{_EXPLAINED}</p>{_table(measured)}<img alt='pictures of routing' src='data:image/png;base64,"
        f"{base64.b64encode(png).decode()}'><h2>Tokens of which an expert takes the largest share</h2>"
        f"<p>Expert, its share of all tokens, and its tokens.</p>{liked}</html>",
    )
    return path


def _table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{found['token_bits']:.2f}</td><td>{found['kind_bits']:.3f}</td><td>{max(found['share']):.0%}</td>"
        f"<td>{'-' if found['co_activation'] is None else format(found['co_activation'], '.0%')}</td>"
        f"<td>{'-' if found['next'] is None else '{:.0%} / {:.0%}'.format(*found['next'])}</td></tr>"
        for name, found in measured.items()
    )
    heads = ("layer", "bits by token", "bits by kind", "largest share", "largest co-activation", "next guessed / without")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"


def draw(routing: RunRouting, measured: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns a PNG, a row for each sparse layer: saturation, experts by kind, and the next layer's experts or co-activation."""
    check(
        importlib.util.find_spec("matplotlib") is not None,
        "The page's pictures need matplotlib: pip install 'flax_switch[plots]', or print figures alone with --json.",
    )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(routing.last)
    figure, axes = plt.subplots(len(layers), 3, figsize=(12, 3.2 * len(layers)), squeeze=False, layout="constrained")
    for row, layer, found in zip(axes, layers, measured.values(), strict=True):
        name = f"{layer[0]} {layer[1]}"
        row[0].plot(list(found["saturation"]), [100 * share for share in found["saturation"].values()], "o-", color="#1f5a96")
        row[0].set(title=f"{name}: choices that stay", xlabel="step", ylabel="% of tokens", ylim=(0, 105))
        row[0].grid(alpha=0.3)
        first, kinds = routing.last[layer][:, 0], routing.tokens[layer[0]].kinds
        by_kind = specialisation.conditional(kinds, first, (len(routing.kinds), routing.num_experts))
        _heat(figure, row[1], by_kind, f"{name}: experts by kind of document", routing.kinds)
        following = layers[layers.index(layer) + 1 :][:1]
        if following and following[0][0] == layer[0]:
            shape = (routing.num_experts, routing.num_experts)
            table = specialisation.conditional(first, routing.last[following[0]][:, 0], shape)
            _heat(figure, row[2], table, f"{name}: expert of the next sparse layer", None)
        elif routing.last[layer].shape[1] > 1:
            _heat(figure, row[2], specialisation.co_activation(routing.last[layer], routing.num_experts), f"{name}: together", None)
        else:
            row[2].bar(range(routing.num_experts), [100 * share for share in found["share"]], color="#1f5a96")
            row[2].axhline(100 / routing.num_experts, ls="--", lw=1, color="#c0392b")
            row[2].set(title=f"{name}: share of tokens", xlabel="expert", ylabel="% (line: even)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _heat(figure: Any, axis: Any, table: np.ndarray, title: str, names: list[str] | None) -> None:
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    if names is not None:
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(title=title, xlabel="expert", ylabel=None if names is not None else "expert")
    figure.colorbar(image, ax=axis, shrink=0.9)
