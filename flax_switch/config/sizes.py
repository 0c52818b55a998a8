"""How many parameters a model has, by arithmetic on its config: in microseconds, without JAX."""

from __future__ import annotations

import dataclasses

from flax_switch.config import SwitchConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """All parameters, and those that take part in computing one token: all but the experts it is not sent to."""

    total: int
    active: int


def count_parameters(config: SwitchConfig) -> ParameterCount:
    """Counts the parameters of `SwitchTransformer(config)`; letters are the axes of `flax_switch.ops`."""
    vocabulary, d, experts = config.vocab_size, config.d_model, config.num_experts
    attention = 4 * d * config.num_heads * config.d_kv
    buckets = config.relative_attention_num_buckets * config.num_heads
    expert = _mlp(config, config.d_ff if config.expert_d_ff is None else config.expert_d_ff)
    tables = 1 + (2 if config.separate_embeddings else 0) + (0 if config.tie_word_embeddings else 1)
    shared, routed = tables * vocabulary * d, 0
    for stack, attentions in zip(config.stacks, (1, 2), strict=True):
        layers, sparse = stack.num_layers, stack.num_sparse
        norms = attentions + 1
        shared += layers * (attentions * attention + norms * d) + d
        shared += buckets * (layers if config.relative_attention_per_layer else 1)
        shared += (layers - sparse) * _mlp(config, config.d_ff)
        shared += sparse * experts * (d * config.learned_router + config.router_bias)
        shared += sparse * (expert if config.shared_expert else 0)
        shared += sparse * (_mlp(config, config.d_ff) + d if config.extra_mlp else 0)
        routed += sparse * experts * expert
    active = routed * config.num_selected_experts // experts if routed else 0
    return ParameterCount(shared + routed, shared + active)


def _mlp(config: SwitchConfig, width: int) -> int:
    """Returns an MLP's kernels: one into the hidden layer for each activation, one out of it."""
    return (len(config.mlp_activations) + 1) * config.d_model * width


def shorten(count: int) -> str:
    """Returns a count in three digits: '619 M', '7.42 B', '1.57 T'."""
    value, unit = float(count), ""
    for unit in ("", " K", " M", " B", " T"):
        if value < 999.5 or unit == " T":
            break
        value /= 1000
    digits = 0 if value >= 99.95 or not unit else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"
