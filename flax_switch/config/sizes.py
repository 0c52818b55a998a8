"""How many parameters a model has, by arithmetic on its config: in microseconds, without JAX."""

from __future__ import annotations

import dataclasses
import math

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.config.heads import LANGUAGE_MODEL, head_shapes


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """All parameters, and those that take part in computing one token: all but the experts it is not sent to."""

    total: int
    active: int


def count_parameters(config: SwitchConfig) -> ParameterCount:
    """Counts the parameters of a config's model; letters are the axes of `flax_switch.ops`."""
    vocabulary, d, experts = config.vocab_size, config.d_model, config.num_experts
    attention = 2 * d * (config.num_heads + config.key_heads) * config.d_kv
    attention += (3 * config.num_heads * config.d_kv + d) * config.use_bias
    norm = 2 * d if config.norm == "layer" else d
    buckets = config.relative_attention_num_buckets * config.num_heads * config.has_bias_tables
    expert = _mlp(config, config.d_ff if config.expert_d_ff is None else config.expert_d_ff)
    tables = 1 + (2 if config.separate_embeddings else 0) + (config.head == LANGUAGE_MODEL and not config.tie_word_embeddings)
    shared, routed = tables * vocabulary * d + sum(map(math.prod, head_shapes(config).values())), 0
    for stack in config.stacks:
        if config.layer_form == "fused":
            rest, of_experts = _fused_layers(config, stack)
            shared += rest + d + buckets * (stack.num_layers if config.relative_attention_per_layer else 1)
            routed += of_experts
            continue
        layers, sparse, attentions = stack.num_layers, stack.num_sparse, 1 + stack.attends_to_source
        norms = attentions + (config.layer_form == "sequential")
        shared += layers * (attentions * attention + norms * norm) + norm
        shared += buckets * (layers if config.relative_attention_per_layer else 1)
        shared += (layers - sparse) * _mlp(config, config.d_ff)
        shared += sparse * experts * (d * config.learned_router + config.router_bias)
        shared += sparse * (expert if config.shared_expert else 0)
        shared += sparse * (_mlp(config, config.d_ff) + norm if config.extra_mlp else 0)
        routed += sparse * experts * expert
    active = routed * config.num_selected_experts // experts if routed else 0
    return ParameterCount(shared + routed, shared + active)


def _fused_layers(config: SwitchConfig, stack: StackConfig) -> tuple[int, int]:
    """Returns the parameters of all fused layers but their experts', and those of the experts."""
    d, heads, k, n = config.d_model, config.num_heads, config.d_kv, len(config.mlp_activations)
    inner = heads * k + config.d_ff  # of the layer's two parts together
    sizes = {"q_wi": d * (heads * k + n * config.d_ff), "kv": 2 * d * k, "o_wo": inner * d}
    routed = sum(sizes[name] for name in config.fused_sparse)
    features = sum(inner if name == "o_wo" else d for name in config.fused_sparse)
    routers = features * config.learned_router + len(config.fused_sparse) * config.router_bias
    dense = stack.num_layers * (sum(sizes.values()) + d) - stack.num_sparse * routed
    return dense + stack.num_sparse * config.num_experts * routers, stack.num_sparse * config.num_experts * routed


def _mlp(config: SwitchConfig, width: int) -> int:
    """Returns an MLP's parameters: a kernel into the hidden layer for each activation, one out of it, and their biases."""
    n, d = len(config.mlp_activations), config.d_model
    return (n + 1) * d * width + (n * width + d) * config.use_bias


def shorten(count: int) -> str:
    """Returns a count in three digits: '619 M', '7.42 B', '1.57 T'."""
    value, unit = float(count), ""
    for unit in ("", " K", " M", " B", " T"):
        if value < 999.5 or unit == " T":
            break
        value /= 1000
    digits = 0 if value >= 99.95 or not unit else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"
