"""The compiled program: the encoder once, a prefix in one pass, then a loop of single tokens until every row is finished."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from flax_switch.config import SwitchConfig
from flax_switch.generation.beam_search import extend_beams, start_beams
from flax_switch.generation.controls import GenerationConfig
from flax_switch.generation.decode_step import decode_step, empty_cache, filled_cache, prepare
from flax_switch.generation.device import Device
from flax_switch.generation.experts import Kernels, cast_experts
from flax_switch.generation.logits import History
from flax_switch.generation.sampling import Rows, extend_rows, start_rows
from flax_switch.nn.outputs import DecoderOutput
from flax_switch.nn.transformer import SwitchTransformer


@flax.struct.dataclass
class ProgramOutput:
    """Buffers of static length and how much of them is filled. R rows were searched, B * n are returned."""

    tokens: Int[Array, "Bn T"]
    new_tokens: Int[Array, ""]  # of the longest sequence, its prefix not counted
    scores: Float[Array, " Bn"] | None  # of beams
    steps: Int[Array, ""]
    step_scores: Float[Array, "steps R V"] | None


def encoder_config(config: SwitchConfig, routing: str) -> SwitchConfig:
    """The config that the encoder runs with: routing as `routing` says."""
    if not config.is_sparse or routing == "as_trained" or (routing == "auto" and config.capacity_mode == "fixed"):
        return config
    changes = dict(ignore_padding_tokens=True, padding_semantics="masked", routing_group="sequence")
    if config.router_type == "tokens_choose":  # experts that choose need a number of tokens to take
        changes.update(capacity_mode="dropless", batch_prioritized_routing=False)
    return config.replace(**changes)


def decoder_config(config: SwitchConfig, routing: str) -> SwitchConfig:
    """The config that the decoder runs with, in which tokens always choose."""
    if config.router_type == "experts_choose":
        config = config.replace(router_type="tokens_choose")
    return encoder_config(config, routing)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="device")
def run_program(
    config: SwitchConfig,
    controls: GenerationConfig,
    params: Mapping[str, Any],
    experts: tuple[tuple[Kernels, ...], ...] | None,
    input_ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    prefix: Int[Array, "B P"],
    seeds: Integer[Array, "B 2"],
    numbers: Mapping[str, Array],
    *,
    device: Device,
) -> ProgramOutput:
    """Encodes, decodes until all rows are finished, and returns what was found.

    controls, numbers: from `controls.split_numbers`. experts: from `experts.split_experts`. device: where the parameters
    lie.
    """
    B, P = prefix.shape
    max_length = P + controls.max_new_tokens
    encoded = _encode(encoder_config(config, controls.routing), params, input_ids, mask, device)
    config = decoder_config(config, controls.routing)
    beams = controls.num_beams
    rows = B * controls.rows_per_source
    if experts is not None:
        experts = tuple(cast_experts(layer, config) for layer in experts)
    decoder = prepare(params, experts, encoded, mask, config, max_length=max_length, rows=rows, beams=beams, device=device)
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s[0]), s[1]))(seeds)
    # In dropless mode nothing depends on padding; with Hugging Face's capacity n-grams count it too, as there.
    as_there = config.capacity_mode == "fixed"
    source = (input_ids, None if as_there else mask)
    if beams > 1:
        state, extend = start_beams(prefix, keys, controls, config.vocab_size), extend_beams
    else:
        n = controls.num_return_sequences
        keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)))(keys).reshape(-1)
        state, extend = start_rows(jnp.repeat(prefix, n, axis=0), keys, controls, config.vocab_size), extend_rows

    def extended(state, logits):
        history = History(state.tokens.reshape(rows, -1), state.length, P, *source)
        return extend(state, logits, history, controls, numbers)

    if P == 1:
        cache = empty_cache(decoder, max_length)
    else:
        output = _prefill(config, params, encoded, mask, prefix)
        cache = filled_cache(decoder, output.cache, max_length)
        assert output.logits is not None  # `generate` takes models with a head only
        state = extended(state, jnp.repeat(output.logits[:, -1], rows // B, axis=0))

    def body(carry):
        state, cache = carry
        ancestors = None if state.ancestors is None else state.ancestors.reshape(rows, -1)
        logits, cache = decode_step(decoder, state.newest, cache, ancestors)
        return extended(state, logits), cache

    state, _ = jax.lax.while_loop(lambda carry: ~carry[0].done, body, (state, cache))
    steps = state.length - P
    if isinstance(state, Rows):
        return ProgramOutput(state.tokens, steps, None, steps, state.scores)
    n = controls.num_return_sequences
    return ProgramOutput(
        tokens=state.finished_tokens[:, :n].reshape(B * n, -1),
        new_tokens=state.finished_lengths[:, :n].max(),
        scores=state.finished_scores[:, :n].reshape(-1),
        steps=steps,
        step_scores=state.step_scores,
    )


def _encode(config: SwitchConfig, params, input_ids, mask, device: Device) -> Float[Array, "B S D"]:
    if device is Device.PROCESSOR and config.moe_executor == "auto":
        # Buffers of a whole capacity are mostly empty, which costs a processor more than sorting the tokens does.
        config = config.replace(moe_executor="ragged")
    model = SwitchTransformer(config)
    return model.apply({"params": params}, input_ids, mask, method="encode").last_hidden_state


def _prefill(config: SwitchConfig, params, encoded, mask, prefix) -> DecoderOutput:
    """Logits and cache of the whole prefix, in one pass and, with a capacity, one chunk."""
    model = SwitchTransformer(config)
    cache = model.apply({"params": params}, encoded, prefix.shape[1], method="init_cache")
    return model.apply({"params": params}, prefix, None, mask, cache=cache, method="decode")
