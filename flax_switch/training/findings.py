"""Says in sentences what the figures of a run mean, for the end of a run and for its report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax_switch.config import SwitchConfig

UNUSED = 0.05  # nats a token: an encoder that is worth less is not used
UNIFORM = 0.98  # of ln E: a router of this entropy sends a token to any expert
CROWDED = 2.0  # times the even share of tokens
DROPPED = 0.05  # of the tokens
WAITING = 0.1  # of a step's time


def findings(model: SwitchConfig, evaluation: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each thing in a held-out evaluation that a person should know of; none where all is well."""
    return [*_encoder(evaluation), *_routers(model, evaluation)]


def run_findings(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each thing in the training lines that a person should know of: waiting for data, skipped updates."""
    said, waits = [], sorted(line["data_wait_fraction"] for line in train)
    if waits and (wait := waits[len(waits) // 2]) > WAITING:
        said.append(f"A step waits for data {100 * wait:.0f} % of its time; raise data.num_workers, or data.prefetch.")
    skipped = max((line.get("skipped_steps", 0) for line in train), default=0)
    if skipped:
        said.append(f"{skipped:,.0f} updates were no numbers and were skipped; lower optimizer.learning_rate if there are more.")
    return said


def _encoder(evaluation: Mapping[str, Any]) -> list[str]:
    gains = [value for name, value in evaluation.items() if name.startswith("encoder_gain/")]
    if not gains or max(gains) >= UNUSED:
        return []
    return [
        f"The encoder is not used: with another example's inputs in place of its own the model loses {max(gains):.2f} nats a "
        "token. A rate relative to the parameters' scale (optimizer.name=adafactor) and targets that must be copied from the "
        "inputs (data.infilling_rate) make it worth something."
    ]


def sparse_layer_names(model: SwitchConfig) -> list[str]:
    """Returns the sparse layers in the order of the metrics: 'encoder 1', 'decoder 1'; of fused layers each router."""
    return list(model.routers)


def _routers(model: SwitchConfig, evaluation: Mapping[str, Any]) -> list[str]:
    said, layers = [], sparse_layer_names(model)
    even = math.log(model.num_experts) if model.num_experts > 1 else 0.0
    for layer, entropy in zip(layers, evaluation.get("routers/router_entropy", ()), strict=False):
        if even and entropy > UNIFORM * even:
            said.append(
                f"The router of {layer} has not specialised: its entropy is {entropy:.2f} of {even:.2f} nats, so a token could as "
                "well go to any expert."
            )
    for layer, loads in zip(layers, evaluation.get("routers/tokens_per_expert", ()), strict=False):
        share = max(loads) * len(loads) / max(sum(loads), 1e-9)
        if len(loads) > 2 and share > CROWDED:
            said.append(f"One expert of {layer} takes {share:.1f} times its even share of the tokens.")
    for layer, dropped in zip(layers, evaluation.get("routers/fraction_tokens_left_behind", ()), strict=False):
        if dropped > DROPPED:
            said.append(f"{layer} leaves {100 * dropped:.0f} % of its tokens to no expert; raise model.capacity_factor.")
    return said
