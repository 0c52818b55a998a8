"""A look at routing: which expert took each token, layer by layer, what was dropped, and how loaded every expert is."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from flax_switch.config import ConfigError, StackConfig, SwitchConfig, check
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.host.files import expanded, write_bytes
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
from flax_switch.ops.kernels.on_disk import run_reading
from flax_switch.ops.moe.routing import RouterOutput
from flax_switch.pages.page import expert_color, ink_on
from flax_switch.pages.plots import drawing

if TYPE_CHECKING:
    from flax_switch.data.vocabulary import Vocabulary
    from flax_switch.pretrained import Pretrained

ANSWER_LENGTH = 24  # tokens of the model's own answer that the decoder is shown with, unless a target is given


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """One sparse layer's decisions about the tokens of one text."""

    layer: int
    chosen: list[list[int]]  # of each token, the experts it was sent to, best first; where experts choose, those that took it
    kept: list[list[bool]]  # of the same, whether the expert had a slot for it
    probability: list[float]  # the router's highest probability for each token

    def dropped(self) -> int:
        """Returns choices that found no slot."""
        return sum(not kept for token in self.kept for kept in token)


@dataclasses.dataclass(frozen=True)
class StackRouting:
    """The routing of one text (or answer) through one stack."""

    stack: str  # "encoder" or "decoder"
    tokens: list[str]
    layers: list[LayerRouting]


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What `explore` returns: a list of stacks for every text, encoder before decoder."""

    config: SwitchConfig
    texts: list[list[StackRouting]]

    def loads(self) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
        """Returns for every (stack, layer) the choices kept and the choices dropped, each [E], over all texts."""
        totals: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        for stacks in self.texts:
            for stack in stacks:
                for layer in stack.layers:
                    zeros = np.zeros(self.config.num_experts, int), np.zeros(self.config.num_experts, int)
                    kept, dropped = totals.setdefault((stack.stack, layer.layer), zeros)
                    for experts, flags in zip(layer.chosen, layer.kept, strict=True):
                        for expert, flag in zip(experts, flags, strict=True):
                            (kept if flag else dropped)[expert] += 1
        return dict(sorted(totals.items(), key=lambda item: (item[0][0] != "encoder", item[0][1])))


def explore(pretrained: Pretrained, texts: Sequence[str], targets: Sequence[str] | None = None) -> Exploration:
    """Runs texts through a model, one at a time, and notes every sparse layer's decisions.

    Routing is what the model's config says for evaluation, capacity included; each text is its own batch.

    Args:
      texts: the encoder's inputs; EOS is added. A decoder-only model reads them after its start token, and its answer behind.
      targets: what the decoder is fed, one for each text; by default the model's own greedy answer.

    Raises:
      ConfigError: if the model has no sparse layer or several routers in one, or the checkpoint no vocabulary.
    """
    config, vocabulary = pretrained.config, pretrained.vocabulary
    check(config.is_sparse, "This model has no sparse layer, so there is no routing to look at.")
    check(config.head == LANGUAGE_MODEL, f"Routing is shown of language models; this one has a head for {config.head}.")
    if vocabulary is None:
        raise ConfigError(
            "This checkpoint has no vocabulary to read the text with; put its SentencePiece model, spiece.model, into its folder."
        )
    check(
        config.layer_form != "fused",
        "The sparse layers of this model are fused, with a router for each of their projections; shown are layers that have one.",
    )
    check(len(texts) > 0, "There is no text to look at; give at least one.")
    check(targets is None or len(targets) == len(texts), "targets must be as many as texts.")
    explored = []
    for i, text in enumerate(texts):
        fed = _fed(pretrained, text, None if targets is None else targets[i])
        routers, _ = run_reading(pretrained.params, functools.partial(_routers, pretrained.model, pretrained.params, *fed))
        explored.append(stack_routings(config, vocabulary, [rows[0].tolist() for rows in fed], routers))
    return Exploration(config, explored)


@functools.partial(jax.jit, static_argnums=0)
def _routers(
    model: SwitchEncoder, params: Mapping, ids: Int[Array, "1 S"], answer: Int[Array, "1 L"] | None = None
) -> dict[str, tuple[RouterOutput, ...]]:
    """Returns what the routers of both stacks, or of one alone, say; to a decoder alone `answer` tells what is text."""
    if model.config.decoder_only:
        assert isinstance(model, SwitchTransformer)
        return {"decoder": model.apply({"params": params}, ids, prefix_mask=answer, output_router_logits=True).decoder_router}
    if answer is None:
        return {"encoder": model.apply({"params": params}, ids, output_router_logits=True).router}
    assert isinstance(model, SwitchTransformer)
    output = model.apply({"params": params}, ids, answer, output_router_logits=True)
    return {"encoder": output.encoder_router, "decoder": output.decoder_router}


def _fed(pretrained: Pretrained, text: str, target: str | None) -> list[Int[Array, "1 L"]]:
    """Returns what each stack reads; for a decoder alone whose inputs see each other also which of it they are."""
    vocabulary = pretrained.vocabulary
    assert vocabulary is not None  # `explore` has refused a checkpoint without one
    if pretrained.config.decoder_only:
        inputs = vocabulary.encode(text)
        if target is None:
            ids = jnp.asarray(pretrained.generate([inputs], max_new_tokens=ANSWER_LENGTH).sequences)
        else:
            ids = jnp.asarray([[pretrained.config.decoder_start_token_id, *inputs, *vocabulary.encode(target)]])
        is_input = (jnp.arange(ids.shape[1]) <= len(inputs))[None].astype(jnp.int32)
        return [ids, is_input] if pretrained.config.bidirectional_inputs else [ids]
    ids = jnp.asarray([[*vocabulary.encode_source(text), vocabulary.eos_id]])
    return [ids] if pretrained.architecture == "encoder" else [ids, _answer(pretrained, ids, target)]


def _answer(pretrained: Pretrained, ids: Int[Array, "1 S"], target: str | None) -> Int[Array, "1 L"]:
    """Returns the decoder's input: the start token and the target, or the model's greedy answer."""
    if target is None:
        return jnp.asarray(pretrained.generate(ids, max_new_tokens=ANSWER_LENGTH).sequences)
    assert pretrained.vocabulary is not None  # `explore` has refused a checkpoint without one
    return jnp.asarray([[pretrained.config.decoder_start_token_id, *pretrained.vocabulary.encode(target)]])


def stack_routings(
    config: SwitchConfig, vocabulary: Vocabulary, fed: Sequence[Sequence[int]], routers: Mapping[str, Sequence[RouterOutput]]
) -> list[StackRouting]:
    """Returns the decisions of the routers of each stack about the first row of what it was fed; padding may follow its tokens."""
    return [
        _stack_routing(stack, [_name(vocabulary, token) for token in ids], routers[stack.name], config)
        for stack, ids in zip(config.stacks, fed, strict=False)
        if routers.get(stack.name)
    ]


def _name(vocabulary, token: int) -> str:
    text = vocabulary.decode([token], skip_special_tokens=False)
    if not text.strip():
        return "\u2581"  # the space that begins a word, as SentencePiece writes it
    return text if text.isprintable() else repr(text)


def _stack_routing(stack: StackConfig, tokens: list[str], routers: Sequence[RouterOutput], config: SwitchConfig) -> StackRouting:
    layers, L = [], len(tokens)
    experts_choose = config.router_type == "experts_choose" and stack.name == "encoder"
    for index, router in zip(stack.sparse_layers, routers, strict=True):
        expert, kept = np.asarray(router.expert_index[0, :L]), np.asarray(router.kept[0, :L])
        if experts_choose:  # an expert that did not take a token did not drop it either
            chosen = [np.flatnonzero(flags).tolist() for flags in kept]
            layers.append(LayerRouting(index, chosen, [[True] * len(c) for c in chosen], _confidence(router, L)))
        else:
            layers.append(LayerRouting(index, expert.tolist(), kept.tolist(), _confidence(router, L)))
    return StackRouting(stack.name, tokens, layers)


def _confidence(router: RouterOutput, length: int) -> list[float]:
    assert router.logits is not None  # asked for
    logits = np.asarray(router.logits[0, :length], np.float64)
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return (exponents.max(-1) / exponents.sum(-1)).tolist()


def render(exploration: Exploration) -> str:
    """Returns the exploration as text: a table for every text and stack, then every layer's load.

    A cell holds the experts a token was sent to; `x` after a number says that this expert had no slot left, `-` that no expert
    took the token.
    """
    return "\n".join([*_token_tables(exploration), *_load_tables(exploration)])


def _cell(experts: list[int], kept: list[bool]) -> str:
    return " ".join(f"{expert}{'' if flag else 'x'}" for expert, flag in zip(experts, kept, strict=True)) or "-"


def _token_tables(exploration: Exploration) -> Iterator[str]:
    for number, stacks in enumerate(exploration.texts, 1):
        for stack in stacks:
            yield f"Text {number}, {stack.stack}: experts by token and layer"
            columns = [["token", *stack.tokens]]
            for layer in stack.layers:
                cells = [_cell(*pair) for pair in zip(layer.chosen, layer.kept, strict=True)]
                columns.append([f"layer {layer.layer}", *cells])
            widths = [max(map(len, column)) for column in columns]
            for row in zip(*columns, strict=True):
                yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            choices = sum(len(token) for layer in stack.layers for token in layer.chosen)
            dropped = sum(layer.dropped() for layer in stack.layers)
            confidence = np.mean([p for layer in stack.layers for p in layer.probability])
            yield f"  {dropped} of {choices} choices dropped; highest probability {confidence:.2f} on average\n"


def _load_tables(exploration: Exploration, width: int = 40) -> Iterator[str]:
    yield "Load: choices each expert processed (#) and dropped (x), over all texts"
    for (stack, layer), (kept, dropped) in exploration.loads().items():
        unused = int((kept + dropped == 0).sum())
        yield f"  {stack} layer {layer}: {kept.sum()} processed, {dropped.sum()} dropped, {unused} of {len(kept)} experts unused"
        scale = min(1.0, width / max((kept + dropped).max(), 1))
        for expert in np.argsort(-(kept + dropped), kind="stable"):
            if kept[expert] + dropped[expert]:
                bar = "#" * round(scale * int(kept[expert])) + "x" * round(scale * int(dropped[expert]))
                more = f" + {dropped[expert]} dropped" if dropped[expert] else ""
                yield f"    expert {expert:4d}  {bar.ljust(width)} {kept[expert]}{more}"


def plot(exploration: Exploration, path: str | Path) -> Path:
    """Draws the exploration: for every text and stack a map of tokens and layers coloured by expert, and every layer's load.

    In a map, a cell shows a token's first choice and a cross marks a choice that was dropped. Needs matplotlib (extra `plots`).
    """
    maps, loads = [stack for stacks in exploration.texts for stack in stacks], exploration.loads()
    longest = max(len(stack.tokens) for stack in maps)
    heights = [1.2 + 0.4 * len(stack.layers) for stack in maps] + [1.6] * len(loads)
    path, picture = expanded(path), io.BytesIO()
    with drawing(max(6.0, 0.35 * longest), sum(heights)) as figure:
        axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for axis, stack in zip(axes, maps, strict=False):
            _draw_choices(axis, stack, exploration.config.num_experts)
        for axis, (where, counts) in zip(axes[len(maps) :], loads.items(), strict=True):
            _draw_load(axis, "{} layer {}".format(*where), *counts)
        figure.savefig(picture, format=path.suffix.removeprefix("."))
    write_bytes(path, picture.getvalue())
    return path


def _draw_choices(axis: Any, stack: StackRouting, experts: int) -> None:
    """Draws a map of tokens and layers, coloured by a token's first choice."""
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([expert_color(expert) for expert in range(experts)])
    first = np.asarray([[chosen[0] if chosen else np.nan for chosen in layer.chosen] for layer in stack.layers], float)
    axis.imshow(first, cmap=colors, vmin=-0.5, vmax=experts - 0.5, aspect="auto", interpolation="nearest")
    places = [(t, i) for i, layer in enumerate(stack.layers) for t, kept in enumerate(layer.kept) if not all(kept)]
    if places:
        axis.scatter(*zip(*places, strict=True), marker="x", color="black", s=25)
    for i, layer in enumerate(stack.layers):
        for t, chosen in enumerate(layer.chosen):
            above = dict(xytext=(0, 4), textcoords="offset points", ha="center", va="bottom")
            ink = ink_on(expert_color(chosen[0])) if chosen else "black"
            axis.annotate(str(chosen[0]) if chosen else "-", (t, i), fontsize=6, color=ink, **above)
    axis.set_xticks(range(len(stack.tokens)), stack.tokens, rotation=90, fontsize=7)
    axis.set_yticks(range(len(stack.layers)), [f"layer {layer.layer}" for layer in stack.layers], fontsize=7)
    axis.grid(visible=False)
    axis.set_title(f"{stack.stack}: expert of each token (x: dropped)")


def _draw_load(axis: Any, name: str, kept: np.ndarray, dropped: np.ndarray) -> None:
    """Draws what a layer's experts processed, and what was dropped."""
    experts = range(len(kept))
    axis.bar(experts, kept, color=[expert_color(expert) for expert in experts], label="processed")
    axis.bar(experts, dropped, bottom=kept, color="white", edgecolor="black", hatch="////", label="dropped")
    axis.set_title(f"{name}: choices by expert")
    axis.legend(fontsize=7)
