"""The explorer's page: tokens coloured by the expert that took them, by layer, with drops and every expert's load."""

from pathlib import Path

from flax_switch.config import SwitchConfig
from flax_switch.host.files import write_text
from flax_switch.inspection.routing import Exploration, LayerRouting, StackRouting
from flax_switch.ops.moe.routing import expert_capacity
from flax_switch.pages.page import cards, expert_color, ink_on, page, text


def write_page(exploration: Exploration, path: str | Path) -> Path:
    """Writes the exploration as one HTML file that needs no network, and returns its path."""
    path = Path(path)
    write_text(path, page("Routing · flax_switch", _body(exploration)))
    return path


def _body(exploration: Exploration) -> str:
    loads = exploration.loads()
    kept, dropped = (sum(int(pair[i].sum()) for pair in loads.values()) for i in (0, 1))
    unused = sum(int((pair[0] + pair[1] == 0).sum()) for pair in loads.values())
    model = exploration.config
    figures = [
        (f"experts in each of {len(loads)} sparse layers", f"{model.num_experts}"),
        ("choices processed", f"{kept:,}"),
        ("choices dropped", f"{dropped:,}"),
        ("experts unused, over all layers", f"{unused:,} of {len(loads) * model.num_experts:,}"),
    ]
    experts = sorted({e for stacks in exploration.texts for s in stacks for layer in s.layers for c in layer.chosen for e in c})
    legend = "".join(_chip(f"expert {expert}", expert) for expert in experts)
    texts = "".join(_text(number, stacks, model) for number, stacks in enumerate(exploration.texts, 1))
    bars = "".join(_load(*where, *counts) for where, counts in loads.items())
    return (
        f'<p class="kind">Routing</p><h1>Which expert took which token</h1>{cards(figures)}'
        f'<div class="card"><h3>Experts</h3><p class="soft">Point at one to see its tokens alone. A token shows its experts, best '
        "first; an expert that is struck through had no free slot, and a token without colour was taken by none.</p>"
        f'<div class="tokens">{legend}</div></div>{texts}'
        f'<h2>Load of every expert, over all texts</h2><div class="charts">{bars}</div>'
    )


def _chip(name: str, expert: int, *, more: str = "", kind: str = "") -> str:
    color = expert_color(expert)
    style = f"background:{color};color:{ink_on(color)}"
    return f'<span class="token{kind}" data-expert="{expert}" style="{style}">{text(name)}{more}</span>'


def _text(number: int, stacks: list[StackRouting], model: SwitchConfig) -> str:
    parts = []
    for stack in stacks:
        layers = "".join(_layer(stack, layer, model) for layer in stack.layers)
        parts.append(f'<div class="card" style="margin-bottom:.9rem"><h3>{stack.stack}</h3>{layers}</div>')
    return f"<h2>Text {number}</h2>{''.join(parts)}"


def _layer(stack: StackRouting, layer: LayerRouting, model: SwitchConfig) -> str:
    choices = sum(map(len, layer.chosen))
    confidence = sum(layer.probability) / max(len(layer.probability), 1)
    said = f"layer {layer.layer}: {layer.dropped()} of {choices} choices dropped; {_slots(len(stack.tokens), model)}"
    chips = "".join(
        _token(token, experts, flags, probability)
        for token, experts, flags, probability in zip(stack.tokens, layer.chosen, layer.kept, layer.probability, strict=True)
    )
    return f'<p class="soft">{said}; highest probability {confidence:.2f} on average</p><div class="tokens">{chips}</div>'


def _slots(tokens: int, model: SwitchConfig) -> str:
    """Returns what capacity a text of so many tokens has."""
    capacity = expert_capacity(model, tokens, deterministic=True)
    return "no expert has a limit" if capacity is None else f"an expert has {capacity} slots for {tokens} tokens"


def _token(token: str, experts: list[int], kept: list[bool], probability: float) -> str:
    if not experts:
        return f'<span class="token none" title="no expert took it">{text(token)}</span>'
    numbers = " ".join(str(expert) if flag else f"<s>{expert}</s>" for expert, flag in zip(experts, kept, strict=True))
    kind = "" if all(kept) else " dropped"
    return _chip(token, experts[0], more=f'<sub title="highest probability {probability:.2f}">{numbers}</sub>', kind=kind)


def _load(stack: str, layer: int, kept, dropped) -> str:
    most = max(int((kept + dropped).max()), 1)
    rows = "".join(
        f'<span>expert {expert}</span><span class="track"><i style="width:{100 * kept[expert] / most:.1f}%;'
        f'background:{expert_color(expert)}"></i><i class="lost" style="width:{100 * dropped[expert] / most:.1f}%"></i></span>'
        f"<span>{kept[expert]}{f' + {dropped[expert]} dropped' if dropped[expert] else ''}</span>"
        for expert in range(len(kept))
    )
    return f'<div class="card"><h3>{stack} layer {layer}</h3><div class="bars">{rows}</div></div>'
