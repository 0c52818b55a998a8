"""FLOPs of a model's matrix products, by arithmetic on its config: without JAX."""

from __future__ import annotations

from flax_switch.config.heads import LANGUAGE_MODEL, head_of
from flax_switch.config.model import SwitchConfig
from flax_switch.config.stacks import StackConfig

BACKWARD = 2  # gradients take two products for each one of the forward pass


def forward_flops(config: SwitchConfig, batch: int, source: int, target: int) -> float:
    """Returns FLOPs of the model's own matrix products in one forward pass over `batch` pairs of `source` and `target` tokens.

    A product of [M, K] and [K, N] counts 2 M K N. Each token counts its N experts once: neither what capacity adds in empty
    slots, nor recomputation, nor what executors do to move tokens. Every position counts, padding too. Causal attention counts
    whole squares, as it is computed. A decoder-only model reads a pair as one sequence.
    """
    if config.decoder_only:
        source, target = 0, source + target
    encoder = 0 if config.decoder_only else _stack_flops(config, config.encoder, source, source)
    if config.head != LANGUAGE_MODEL:
        return float(batch * _head_flops(config, encoder, source, target))
    decoder = _stack_flops(config, config.decoder, target, source) + 2 * target * config.d_model * config.vocab_size
    return float(batch * (encoder + decoder))


def _head_flops(config: SwitchConfig, encoder: int, source: int, target: int) -> int:
    """Returns FLOPs of a row with a task's head, its own few apart: a decoder reads the inputs; embeddings are of two texts."""
    if config.head == "embedding":
        return 2 * _stack_flops(config, config.encoder, max(source, target), max(source, target))
    return encoder + (_stack_flops(config, config.decoder, source, source) if head_of(config).reads_decoder else 0)


def train_flops(config: SwitchConfig, batch: int, source: int, target: int) -> float:
    """Returns FLOPs of a train step: the forward pass and twice as much for the gradients."""
    return (1 + BACKWARD) * forward_flops(config, batch, source, target)


def _stack_flops(config: SwitchConfig, stack: StackConfig, length: int, source: int) -> int:
    """Returns the FLOPs of one sequence of `length` tokens; a decoder attends to `source` encoded ones, too."""
    D, HK = config.d_model, config.num_heads * config.d_kv
    kernels = 3 if config.is_gated else 2
    attention = 2 * length * 2 * D * (HK + config.key_heads * config.d_kv) + 2 * length * 2 * length * HK
    if stack.attends_to_source:
        attention += 2 * (2 * length + 2 * source) * D * HK + 2 * length * 2 * source * HK
    if config.layer_form == "fused":
        routed = sum((HK + config.d_ff if name == "o_wo" else D) * config.num_experts for name in config.fused_sparse)
        again = {"q_wi": D * (HK + (kernels - 1) * config.d_ff), "kv": 2 * D * config.d_kv, "o_wo": D * (HK + config.d_ff)}
        routed += (config.num_selected_experts - 1) * sum(again[name] for name in config.fused_sparse)
        return stack.num_layers * (attention + 2 * length * kernels * D * config.d_ff) + stack.num_sparse * 2 * length * routed
    dense = 2 * length * kernels * D * config.d_ff
    expert = 2 * length * kernels * D * config.expert_width
    sparse = 2 * length * D * config.num_experts + expert * (config.num_selected_experts + config.shared_expert)
    sparse += dense * config.extra_mlp
    return stack.num_layers * attention + stack.num_sparse * sparse + (stack.num_layers - stack.num_sparse) * dense
