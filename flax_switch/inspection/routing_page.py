"""The routing of a run as one HTML page, with pictures one can point into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_switch.host.files import write_text
from flax_switch.inspection import specialisation
from flax_switch.inspection.run_routing import Layer, RunRouting
from flax_switch.pages.page import SCALE, curves, heat, page, table, text

_EXPLAINED = (
    "Held-out text through every checkpoint of the run. Saturation is the share of the last checkpoint's choices that were made "
    "then already. Bits are what a token, or the kind of document it is from, says about its expert (mutual information, what "
    "chance would give taken off). How often the next sparse layer's expert is guessed stands beside how often it is without."
)


def write_page(routing: RunRouting, measured: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Writes the page, one file that needs no network, and returns its path."""
    path = Path(path)
    write_text(path, page("Routing of a run · flax_switch", _body(routing, measured)))
    return path


def _body(routing: RunRouting, measured: Mapping[str, Mapping[str, Any]]) -> str:
    stays = [
        {"name": name, "x": list(found["saturation"]), "y": [100 * share for share in found["saturation"].values()], "points": True}
        for name, found in measured.items()
    ]
    maps = "".join(_maps(routing, layer, name) for layer, name in zip(routing.last, measured, strict=True))
    liked = "".join(f'<div class="card"><h3>{name}</h3>{_liked(found)}</div>' for name, found in measured.items())
    return (
        f'<p class="kind">Routing of a run</p><h1>How the routers choose</h1><p class="soft">{_EXPLAINED}</p>'
        f'<div class="card">{_table(measured)}</div><h2>Choices that stay</h2>'
        f'<div class="charts">{curves("Saturation", "% of tokens", stays, zero=True)}</div>'
        f"<h2>Experts by what they are given</h2>{SCALE.format(low='none', high='the highest share of the map')}"
        f'<div class="maps">{maps}</div>'
        '<h2>Tokens of which an expert takes the largest share</h2><p class="soft">Expert, its share of all tokens, and its '
        f'tokens.</p><div class="charts">{liked}</div>'
    )


def _maps(routing: RunRouting, layer: Layer, name: str) -> str:
    """Returns a layer's experts by kind of document, and by the next sparse layer's experts or by those taken together."""
    chosen, experts = routing.last[layer], routing.num_experts
    numbers, square = [str(expert) for expert in range(experts)], (experts, experts)
    by_kind = specialisation.conditional(routing.tokens[layer[0]].kinds, chosen[:, 0], (len(routing.kinds), experts))
    drawn = _map(f"{name}: experts of a kind of document", "", routing.kinds, "expert", by_kind)
    layers = list(routing.last)
    following = layers[layers.index(layer) + 1 :][:1]
    if following and following[0][0] == layer[0]:
        values = specialisation.conditional(chosen[:, 0], routing.last[following[0]][:, 0], square)
        drawn += _map(f"{name}: experts of the next sparse layer", "expert", numbers, "next layer's expert", values)
    elif chosen.shape[1] > 1:
        values = specialisation.co_activation(chosen, experts)
        drawn += _map(f"{name}: experts together", "expert", numbers, "with expert", values)
    return drawn


def _map(title: str, row: str, rows: list[str], axis: str, values: Any) -> str:
    high = float(values.max()) or 1.0
    return heat(title, row, rows, range(values.shape[1]), values.tolist(), high=high, unit="of its tokens", axis=axis, tall=16)


def _table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            text(name),
            f"{found['token_bits']:.2f}",
            f"{found['kind_bits']:.3f}",
            f"{max(found['share']):.0%}",
            "–" if found["co_activation"] is None else f"{found['co_activation']:.0%}",
            "–" if found["next"] is None else "{:.0%} / {:.0%}".format(*found["next"]),
        ]
        for name, found in measured.items()
    ]
    heads = ("layer", "bits by token", "bits by kind", "largest share", "largest co-activation", "next guessed / without")
    return table(heads, rows, "stack numbers")


def _liked(found: Mapping[str, Any]) -> str:
    rows = [
        [str(expert), f"{share:.0%}", " ".join(f"<code>{text(token)}</code>" for token in tokens)]
        for expert, (share, tokens) in enumerate(zip(found["share"], found["likes"], strict=True))
    ]
    return table(("expert", "share", "tokens"), rows)
