"""The compiled program: the encoder once, a prefix in one pass, then a loop of single tokens until every row is finished.

What a decoder-only model continues is such a prefix, its rows filled up on the left.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from flax_switch.config import SwitchConfig
from flax_switch.config.generation import GenerationConfig
from flax_switch.config.weights import BIAS
from flax_switch.generation.beam_search import Beams, extend_beams, start_beams
from flax_switch.generation.constraint import allowed_tokens
from flax_switch.generation.contrastive_search import Candidates, choose, propose, start_candidates
from flax_switch.generation.diverse_search import Groups, best_of_groups, extend_groups, start_groups
from flax_switch.generation.logits import History
from flax_switch.generation.sampling import Rows, extend_rows, start_rows
from flax_switch.generation.t5x_search import best_found, extend_live, start_live
from flax_switch.nn.cache import DecoderCache
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops import Size
from flax_switch.ops.kernels import platforms
from flax_switch.ops.kernels.loops import apart
from flax_switch.ops.kernels.narrow import Narrow, decodes_few, for_few, widened_late
from flax_switch.ops.kernels.on_disk import OnDisk
from flax_switch.ops.kernels.quantized import Quantized
from flax_switch.ops.mlp import expert_dtype
from flax_switch.parallel.placement import ONE_DEVICE, Placement

State = Rows | Beams | Groups | Candidates


@flax.struct.dataclass
class ProgramOutput:
    """Buffers of static length and how much of them is filled. R rows were searched, B * n are returned."""

    tokens: Int[Array, "Bn T"]
    new_tokens: Int[Array, ""]  # of the longest sequence, its prefix not counted
    scores: Float[Array, " Bn"] | None  # of beams
    steps: Int[Array, ""]
    step_scores: Float[Array, "steps R V"] | None


def encoder_config(config: SwitchConfig, routing: str) -> SwitchConfig:
    """Returns the config that the encoder runs with: routing as `routing` says."""
    if not config.is_sparse or routing == "as_trained" or (routing == "auto" and config.capacity_mode == "fixed"):
        return config
    changes = dict(ignore_padding_tokens=True, padding_semantics="masked", routing_group="sequence")
    if config.router_type != "experts_choose":  # experts that choose need a number of tokens to take
        changes.update(capacity_mode="dropless", batch_prioritized_routing=False)
    return config.replace(**changes)


def decoder_config(config: SwitchConfig, routing: str) -> SwitchConfig:
    """Returns the config that the decoder runs with: there experts never choose."""
    if config.router_type == "experts_choose":
        config = config.replace(router_type="tokens_choose")
    return encoder_config(config, routing)


@dataclasses.dataclass(frozen=True)
class Search:
    """What every step of a search needs, inside a program. The state of rows or beams and the cache go from step to step.

    controls, numbers: from `controls.split_numbers`; with a number "constraint", of what `constraint.allowed_tokens` asks.
    input_ids, mask: the sources; of a decoder-only model the prefix once more, and where it is not filled up.
    variables: "params" and, where it is faster to read experts one by one, those of `few_rows.unstacked_experts`.
    devices: where the parameters lie.
    max_length: places of a row without beams, the prefix included; None: as many as `controls` say.
    """

    config: SwitchConfig
    controls: GenerationConfig
    variables: Mapping[str, Any]
    input_ids: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    prefix: Int[Array, "B P"]
    numbers: Mapping[str, Array]
    devices: Placement = ONE_DEVICE
    max_length: Size | None = None

    @functools.cached_property
    def model(self) -> SwitchTransformer:
        """The decoder's model."""
        return SwitchTransformer(decoder_config(self.config, self.controls.routing), devices=self.devices)

    @functools.cached_property
    def ready(self) -> dict[str, Any]:
        """The variables in the dtype that the decoder computes in."""
        return in_compute_dtype(self.variables, self.model.config, self.rows if self.devices == ONE_DEVICE else None)

    @property
    def rows(self) -> Size:
        """R, the rows that are decoded."""
        return self.prefix.shape[0] * self.controls.rows_per_source

    @property
    def places(self) -> Size:
        """T, the places of a row."""
        return self.prefix.shape[1] + self.controls.max_new_tokens if self.max_length is None else self.max_length

    def started(self, seeds: Integer[Array, "B 2"]) -> tuple[State, DecoderCache]:
        """Returns the state after the prefix, if it is more than the start token, and the cache; `step` goes on with them."""
        (B, P), controls = self.prefix.shape, self.controls
        encoded = encode(self.config, controls, self.variables, self.input_ids, self.mask, self.devices)
        cache = start_cache(self.model, self.ready, encoded, self.places, controls.rows_per_source, controls.rows_together)
        if P == 1 and controls.penalty_alpha is None:
            return self._begun(seeds), cache
        # The whole prefix in one pass and, with a capacity, one chunk.
        empty = start_cache(self.model, self.ready, encoded, P)
        logits, states, before = decode_states(self.model, self.ready, self.prefix, self.mask, empty)
        if controls.penalty_alpha is not None:
            counts = self.mask if self.config.decoder_only else jnp.ones((B, P), bool)
            state = start_candidates(self.prefix, states, counts, controls, self.config.vocab_size, self.places)
            return self.extended(state, logits), cache.after(before)
        return self.extended(self._begun(seeds), jnp.repeat(logits, self.rows // B, axis=0)), cache.after(before)

    def _begun(self, seeds: Integer[Array, "B 2"]) -> State:
        """Returns the state with the prefix alone."""
        controls, vocab_size = self.controls, self.config.vocab_size
        keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s[0]), s[1]))(seeds)
        if controls.num_beams > 1:
            plain: Any = start_beams if controls.num_beam_groups == 1 else start_groups
            return (start_live if controls.search == "t5x" else plain)(self.prefix, keys, controls, vocab_size)
        n = controls.num_return_sequences
        keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)))(keys).reshape(-1)
        return start_rows(jnp.repeat(self.prefix, n, axis=0), keys, controls, vocab_size, self.places)

    def step(self, carry: tuple[State, DecoderCache]) -> tuple[State, DecoderCache]:
        """Decodes the newest token of each row and chooses the next."""
        state, cache = carry
        mask = self.mask
        if self.config.decoder_only:  # after the prefix the mask is of all places of each row
            new = ((0, 0), (0, self.places - self.prefix.shape[1]))
            mask = jnp.pad(jnp.repeat(mask, self.rows // mask.shape[0], axis=0), new, constant_values=True)
        cache = dataclasses.replace(cache, ancestors=state.ancestors)
        logits, states, cache = decode_states(self.model, self.ready, state.newest[:, None], mask, cache)
        if isinstance(state, Candidates):
            state, logits = choose(state, logits, states, self.controls, self.numbers)
        return self.extended(state, logits), dataclasses.replace(cache, ancestors=None)

    def extended(self, state: State, logits: Float[Array, "R V"]) -> State:
        """Returns the state with one more token for each row; of contrastive search, with candidates for one."""
        controls, (B, P) = self.controls, self.prefix.shape
        # In dropless mode nothing depends on padding; with Hugging Face's capacity n-grams count it too, as there.
        source_mask = None if self.model.config.capacity_mode == "fixed" else self.mask
        tokens = state.tokens if state.tokens.ndim == 2 else state.tokens.reshape(self.rows, -1)
        history = History(tokens, state.length, P, self.input_ids, source_mask)
        failed = jnp.bool_(False)
        if "constraint" in self.numbers:
            asked = state.alive(controls)
            allowed, failed = allowed_tokens(self.numbers["constraint"], tokens, state.length, asked, B, self.config.vocab_size)
            if controls.num_beams == 1:  # what follows a row's end is padding, whatever is allowed
                allowed |= ~asked[:, None]
            history = dataclasses.replace(history, allowed=allowed)
        extends = {Rows: extend_rows, Groups: extend_groups, Candidates: propose}
        extend: Any = extends.get(type(state), extend_live if controls.search == "t5x" else extend_beams)
        state = extend(state, logits, history, controls, self.numbers)
        return dataclasses.replace(state, done=state.done | failed)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("devices", "max_length"))
def run_program(
    config: SwitchConfig,
    controls: GenerationConfig,
    variables: Mapping[str, Any],
    input_ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    prefix: Int[Array, "B P"],
    seeds: Integer[Array, "B 2"],
    numbers: Mapping[str, Array],
    *,
    devices: Placement = ONE_DEVICE,
    max_length: Size | None = None,
) -> ProgramOutput:
    """Encodes, decodes until all rows are finished, and returns what was found; for the arguments see `Search`."""
    (B, P), n = prefix.shape, controls.num_return_sequences
    search = Search(config, controls, variables, input_ids, mask, prefix, numbers, devices, max_length)

    def step(carry: tuple[State, DecoderCache]) -> tuple[State, DecoderCache]:
        state, cache = search.step(carry)
        return state, dataclasses.replace(cache, index=apart(cache.index))

    state, _ = jax.lax.while_loop(lambda carry: ~carry[0].done, step, search.started(seeds))
    steps = state.length - P
    if isinstance(state, (Rows, Candidates)):
        return ProgramOutput(state.tokens, steps, None, steps, state.scores)
    if isinstance(state, Groups):
        state = best_of_groups(state)
    elif controls.search == "t5x":
        state = best_found(state, P)
    return ProgramOutput(
        tokens=state.finished_tokens[:, :n].reshape(B * n, -1),
        new_tokens=state.finished_lengths[:, :n].max(),
        scores=state.finished_scores[:, :n].reshape(-1),
        steps=steps,
        step_scores=state.step_scores,
    )


def encode(
    config: SwitchConfig,
    controls: GenerationConfig,
    variables: Mapping[str, Any],
    input_ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    devices: Placement,
) -> Float[Array, "B S D"] | Size:
    """Returns what `start_cache` takes: the encoder's output, or of a decoder-only model B."""
    if config.decoder_only:
        return input_ids.shape[0]
    encoder = SwitchTransformer(encoder_config(config, controls.routing), devices=devices)
    if devices == ONE_DEVICE:
        variables = {**variables, "params": _widened_late(variables["params"], encoder.config)}
    return encoder.apply(variables, input_ids, mask, method="encode").last_hidden_state


def start_cache(
    model: SwitchTransformer,
    variables: Mapping[str, Any],
    encoded: Float[Array, "B S D"] | Size,
    max_length: Size,
    rows_per_source: int = 1,
    beams: int = 1,
) -> DecoderCache:
    """Calls `SwitchTransformer.init_cache`."""
    return model.apply(variables, encoded, max_length, rows_per_source, beams=beams, method="init_cache")


def decode(
    model: SwitchTransformer, variables: Mapping[str, Any], tokens: Int[Array, "R L"], mask: Bool[Array, "B S"], cache: DecoderCache
) -> tuple[Float[Array, "R V"], DecoderCache]:
    """Returns logits (float32) after the last of some more tokens of each row, and the cache with them; see `decode_states`."""
    logits, _, cache = decode_states(model, variables, tokens, mask, cache)
    return logits, cache


def decode_states(
    model: SwitchTransformer, variables: Mapping[str, Any], tokens: Int[Array, "R L"], mask: Bool[Array, "B S"], cache: DecoderCache
) -> tuple[Float[Array, "R V"], Float[Array, "R L D"], DecoderCache]:
    """Returns logits (float32) after the last of some more tokens of each row, the decoder's states at all, and the cache.

    mask: of the source; of a decoder-only model [R, T], of its own places. Several tokens at once are its inputs.
    """
    if model.config.decoder_only:
        L = tokens.shape[1]
        real = mask if mask.shape[1] == L else None
        causal = L == 1 or not model.config.bidirectional_inputs
        output = model.apply(
            variables, tokens, None, None, mask, cache=cache, decoder_padding_mask=real, causal=causal, method="decode"
        )  # fmt: skip
    else:
        output = model.apply(variables, tokens, None, mask, cache=cache, method="decode")
    return output.logits[:, -1], output.last_hidden_state, output.cache


def in_compute_dtype(variables: Mapping[str, Any], config: SwitchConfig, rows: Size | None = None) -> dict[str, Any]:
    """Casts kernels of floats to the dtype that they are multiplied in, once instead of in every step.

    Embeddings, norms, biases, the router and an untied head compute in dtypes of their own. On a CPU those of a decoder in bfloat16
    stay as they are where it decodes few rows (`narrow`).

    rows: that are decoded on one device; None: not known, or on several.
    """
    forms = (Quantized, Narrow, OnDisk)

    def cast(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        dtype = expert_dtype(config) if {"expert", "experts", "shared_expert"} & {*names} else jnp.dtype(config.dtype)
        few = config.layer_form != "fused" and decodes_few(rows, dtype)
        if isinstance(leaf, OnDisk):
            return dataclasses.replace(leaf, few=few)
        if isinstance(leaf, Narrow):
            return for_few(leaf, few)
        if isinstance(leaf, Quantized) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if "router" in names or not {"kernel", "experts"} & {*names}:
            return leaf
        if "decoder" in names and _may_stay(names):
            leaf = for_few(leaf, few)
        return leaf if isinstance(leaf, Narrow) or "logits_dense" in names else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, dict(variables), is_leaf=lambda leaf: isinstance(leaf, forms))


def _widened_late(params: Mapping[str, Any], config: SwitchConfig) -> Mapping[str, Any]:
    """Returns parameters of which, on a CPU, an encoder's large kernels of 16 bits are not widened all at once."""
    if platforms.target() != "cpu" or config.layer_form == "fused" or config.scan_layers:
        return params

    def late(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        dtype = expert_dtype(config) if "expert" in names else jnp.dtype(config.dtype)
        fitting = dtype == jnp.float32 and "kernel" in names and not {"router", "shared_expert", "a", "b", "gain"} & {*names}
        return widened_late(leaf) if fitting else leaf

    whole = lambda leaf: isinstance(leaf, (Quantized, Narrow, OnDisk))  # noqa: E731
    return {**params, "encoder": jax.tree_util.tree_map_with_path(late, params["encoder"], is_leaf=whole)}


def _may_stay(names: Sequence[str]) -> bool:
    """Returns whether a kernel is of those that may be multiplied in bfloat16: no stack, no adapter's, no bias."""
    return not {"expert", "shared_expert"} & {*names} and names[-1] not in ("a", "b", "gain") and not names[-1].endswith(BIAS)
