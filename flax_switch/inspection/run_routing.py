"""How a training run's routers came to choose as they do: their choices for the same held-out tokens at every checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from flax_switch.config import ConfigError, ExperimentConfig, SwitchConfig, check
from flax_switch.convert.training_run import find_checkpoint
from flax_switch.data.kinds import heldout_by_kind
from flax_switch.inspection import specialisation
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import load_pretrained
from flax_switch.training.checkpoint import read_config

ROWS, FEWEST_ROWS = 96, 8  # held-out examples of a kind of document
LIKED = 8  # tokens shown of an expert
OFTEN = 20  # times that a token must occur to be shown

Layer = tuple[str, int]  # stack and index
Batch = Mapping[str, Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The M real tokens that a stack read, in one order for all checkpoints: ids, and the number of the kind of document."""

    ids: np.ndarray
    kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunRouting:
    """What the routers of a run chose. `chosen` has for each checkpoint's step, sparse layer and token N experts: [M, N]."""

    num_experts: int
    kinds: list[str]
    tokens: dict[str, Tokens]  # by stack
    names: dict[int, str]  # token ids that occur -> text
    chosen: dict[int, dict[Layer, np.ndarray]]

    @property
    def last(self) -> dict[Layer, np.ndarray]:
        """The choices at the last checkpoint."""
        return self.chosen[max(self.chosen)]


def follow(run: str | Path) -> RunRouting:
    """Sends the same held-out text through every checkpoint of a pre-training run and notes the choices of its routers.

    Raises `ConfigError` for a folder that is no such run, a model that has no sparse layer or whose experts choose, a run without
    a checkpoint and held-out text that is too little.
    """
    config = read_config(run)
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{run} is a run of {config.kind}; routing is followed through runs of pre-training. See inspect --text.")
    check(config.model.is_sparse, f"The model of {run} has no sparse layer, so there is no routing to look at.")
    _check_one_router_a_layer(config.model)
    check(config.model.router_type != "experts_choose", "Experts choose in this model; measured is what tokens choose.")
    last = find_checkpoint(Path(run))
    if last is None:
        raise ConfigError(f"{run} has no checkpoint yet; the first comes after train.checkpoint_every steps.")
    steps = sorted(int(path.name) for path in last.parent.iterdir() if path.name.isdigit() and find_checkpoint(path) == path)
    vocabulary = load_pretrained(last).vocabulary
    assert vocabulary is not None  # a run keeps it
    batches = heldout_by_kind(config.data, vocabulary, ROWS, FEWEST_ROWS)
    check(
        len(batches) > 0,
        f"The held-out text of {run} is too little: no kind of document has {FEWEST_ROWS} examples. It takes a run on more text "
        "or with a larger data.heldout_fraction.",
    )
    tokens = {stack.name: _tokens(list(batches.values()), *_READ[stack.name]) for stack in config.model.stacks}
    occurring = np.unique(np.concatenate([found.ids for found in tokens.values()])).tolist()
    names = {i: vocabulary.decode([i], skip_special_tokens=False).strip() or "\u2581" for i in occurring}
    chosen = {step: _choices(last.parent / str(step), config.model, list(batches.values())) for step in steps}
    return RunRouting(config.model.num_experts, list(batches), tokens, names, chosen)


def _check_one_router_a_layer(model: SwitchConfig) -> None:
    check(
        model.layer_form != "fused",
        "The sparse layers of this model are fused, with a router for each projection; followed are layers that have one. "
        "The run's report has every router's load.",
    )


def _tokens(batches: list[Batch], ids: str, mask: str) -> Tokens:
    real = [np.asarray(batch[mask]).astype(bool) for batch in batches]
    found = [np.asarray(batch[ids])[there] for batch, there in zip(batches, real, strict=True)]
    return Tokens(np.concatenate(found), np.repeat(np.arange(len(batches)), [len(part) for part in found]))


def _choices(step: Path, config: SwitchConfig, batches: list[Batch]) -> dict[Layer, np.ndarray]:
    pretrained = load_pretrained(step, capacity_mode="dropless")  # a choice is one whether or not there was room
    layers = [(stack.name, index) for stack in config.stacks for index in stack.sparse_layers]
    found: dict[Layer, list[np.ndarray]] = {layer: [] for layer in layers}
    assert isinstance(pretrained.model, SwitchTransformer)
    for batch in batches:
        fed = {name: batch[name] for stack in config.stacks for name in _READ[stack.name]}
        if config.bidirectional_inputs:
            fed["prefix_mask"] = batch["prefix_mask"]
        experts = _experts(pretrained.model, pretrained.params, fed)
        for layer, expert in zip(layers, experts, strict=True):
            mask = batch[_READ[layer[0]][1]]
            found[layer].append(np.asarray(expert)[np.asarray(mask).astype(bool)])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


# What of a batch a stack reads: ids, and the mask of real ones.
_READ = {
    "encoder": ("input_ids", "attention_mask"),
    "decoder": ("decoder_input_ids", "decoder_attention_mask"),
}


@functools.partial(jax.jit, static_argnums=0)
def _experts(model: SwitchTransformer, params: Mapping, fed: Mapping[str, Int[Array, "B L"]]) -> list[Int[Array, "B L N"]]:
    inputs: dict[str, Any] = dict(fed)
    output = model.apply({"params": params}, **inputs)
    return [router.expert_index for router in (*output.encoder_router, *output.decoder_router)]


def measure(routing: RunRouting) -> dict[str, dict[str, Any]]:
    """Returns for every sparse layer, named as "encoder 1", its figures at the last checkpoint, ready to be written as JSON.

    saturation: by step, the share of the last checkpoint's choices that were made then already. share: of each expert among
    first choices. token_bits, kind_bits: what the token, the kind of document say about the first choice. co_activation: the
    largest share of an expert's tokens that another one takes, too. next: how often the next sparse layer's first choice is
    guessed by this one's, and how often without; None where no sparse layer follows in the stack.
    """
    layers = list(routing.last)
    measured = {}
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        chosen, tokens = routing.last[layer], routing.tokens[layer[0]]
        first = chosen[:, 0]
        follows = following if following is not None and following[0] == layer[0] else None
        guessed = specialisation.predictability(first, routing.last[follows][:, 0]) if follows else None
        together = specialisation.co_activation(chosen, routing.num_experts)
        measured[f"{layer[0]} {layer[1]}"] = {
            "saturation": {step: specialisation.saturation(at[layer], chosen) for step, at in sorted(routing.chosen.items())},
            "share": (np.bincount(first, minlength=routing.num_experts) / len(first)).tolist(),
            "token_bits": specialisation.specialisation(first, tokens.ids),
            "kind_bits": specialisation.specialisation(first, tokens.kinds),
            "co_activation": float(together.max()) if chosen.shape[1] > 1 else None,
            "next": guessed,
            "likes": _likes(routing, layer),
        }
    return measured


def _likes(routing: RunRouting, layer: Layer) -> list[list[str]]:
    """Returns for each expert the frequent tokens of which it takes the largest share, largest first."""
    ids, first = routing.tokens[layer[0]].ids, routing.last[layer][:, 0]
    counts = specialisation.joint_counts(ids, first)
    counts = np.pad(counts, ((0, 0), (0, routing.num_experts - counts.shape[1])))
    total = counts.sum(1)
    often = np.flatnonzero(total >= OFTEN)
    shares = counts[often] / total[often, None]
    best = np.argsort(-shares, axis=0, kind="stable")[:LIKED]
    return [[routing.names[int(often[i])] for i in best[:, e] if shares[i, e] > 0] for e in range(routing.num_experts)]


def render(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures as a table, a line for each sparse layer."""
    lines = [f"{'layer':<12}{'bits by token':>15}{'by kind':>10}{'largest share':>15}{'next guessed':>22}  saturation by step"]
    for name, found in measured.items():
        guessed = "-" if found["next"] is None else "{:.0%} ({:.0%} without)".format(*found["next"])
        steps = ", ".join(f"{step}: {share:.0%}" for step, share in found["saturation"].items())
        lines.append(
            f"{name:<12}{found['token_bits']:>15.2f}{found['kind_bits']:>10.3f}{max(found['share']):>15.0%}{guessed:>22}  {steps}"
        )
    return "\n".join(lines)
