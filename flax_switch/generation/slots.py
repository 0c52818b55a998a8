"""Slots: rows of one decoder that begin and end at different times, each with a source, controls and draws that are its alone.

`generate` takes a batch from its first token to its last. Here a row joins between two steps (`SlotDecoder.admit`), and `run` takes
some steps of the rows at work. What a row says is what `generate` says of its source alone: the same decoder,
sampling and keys. A cache that is filled in a circle (`nn.cache.RingCache`) lets rows stand at different lengths.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from flax_switch.config import SwitchConfig
from flax_switch.config.generation import GenerationConfig, split_numbers
from flax_switch.convert.scan import unstack_layers
from flax_switch.generation.logits import History
from flax_switch.generation.program import decode, decoder_config, encoder_config, in_compute_dtype, start_cache
from flax_switch.generation.sampling import Rows, extend_rows, start_rows
from flax_switch.nn.adapter import without_adapter
from flax_switch.nn.cache import RingCache
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.few_rows import unstacked_experts
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.on_disk import run_reading

MOST_TOP_K = 128  # one program serves every top_k up to it
ALTERNATIVES = 5  # tokens whose log-probabilities are noted beside the chosen one's
GREEDY, SAMPLED, FILTERED = range(3)  # what a step must be able to do: FILTERED sorts the vocabulary for top_p


@flax.struct.dataclass
class Wishes:
    """What was asked for each of R rows."""

    limit: Int[Array, " R"]  # new tokens at most
    greedy: Bool[Array, " R"]
    numbers: dict[str, Array]  # values of controls [R]


@flax.struct.dataclass
class Scores:
    """Log-probabilities of the model, before any control, where they were asked for."""

    chosen: Float[Array, "R T"]
    best: Float[Array, "R T alternatives"]
    best_ids: Int[Array, "R T alternatives"]


class Progress(NamedTuple):
    """How far R rows are: what `Rows` holds, with a length for each."""

    tokens: Int[Array, "R T"]  # the start token, then new ones
    length: Int[Array, " R"]
    finished: Bool[Array, " R"]
    keys: Key[Array, " R"]

    @property
    def newest(self) -> Int[Array, "R 1"]:
        """The tokens that the decoder has not seen yet."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)


@flax.struct.dataclass
class Slots:
    """The state of R rows."""

    cache: RingCache
    source: Int[Array, "R S"]
    mask: Bool[Array, "R S"]
    progress: Progress
    wishes: Wishes
    scores: Scores


class Report(NamedTuple):
    """Where the rows of a run stand; arrays lie on the device."""

    tokens: Int[Array, "R T"]  # new ones, EOS included
    lengths: Int[Array, " R"]
    finished: Bool[Array, " R"]
    steps: Int[Array, ""]  # that were taken
    scores: Scores


class Row(NamedTuple):
    """What enters a slot: a source, controls with the model's special tokens filled in, and what decides its draws.

    draws: the seed, the source's number among those with the same seed, and the sample's among those of the source.
    """

    ids: Sequence[int]
    controls: GenerationConfig
    draws: tuple[int, int, int]


class SlotDecoder:
    """The compiled programs of one model. All sizes are settled by the arguments of a call; nothing else compiles anew."""

    def __init__(self, config: SwitchConfig, params: Mapping[str, Any], controls: GenerationConfig, max_new_tokens: int):
        """Takes a model and its defaults; `controls` are those of every row but for what `level_of` and `Wishes` tell apart."""
        self.config, config = config, config.replace(scan_layers=False)
        self.max_new_tokens = max_new_tokens
        controls = dataclasses.replace(controls, max_new_tokens=max_new_tokens)
        self.encoder = SwitchTransformer(encoder_config(config, controls.routing))
        self.decoder = SwitchTransformer(decoder_config(config, controls.routing))
        self.variables = self._variables(self._layers_of(params))
        levels = _levels(controls)
        self._empty = jax.jit(functools.partial(_empty, self.decoder, levels[0]), static_argnums=(1, 2))
        self._admit = jax.jit(functools.partial(_admit, self.encoder, self.decoder, levels[0]), donate_argnums=1)
        self._run = jax.jit(functools.partial(_run, self.decoder, levels), donate_argnums=1)

    def with_adapter(self, params: Mapping[str, Any]) -> Self:
        """Returns a decoder of the same model with another adapter in its parameters, or with none.

        Kernels are this one's, and so are the programs where adapters have the same shapes.
        """

        def mine(own: Any, other: Any) -> Any:
            return dataclasses.replace(other, base=own) if isinstance(other, Adapted) else own

        own = without_adapter(self.variables["params"])
        params = jax.tree.map(mine, own, self._layers_of(params), is_leaf=lambda leaf: isinstance(leaf, Narrow))
        other = copy.copy(self)
        other.variables = self._variables(params)
        return other

    def _layers_of(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return unstack_layers(params, self.config) if self.config.scan_layers else params

    def _variables(self, params: Mapping[str, Any]) -> dict[str, Any]:
        config, variables = self.decoder.config, {"params": params}
        if unstacked := unstacked_experts(params, config.decoder.sparse_layers, config.num_experts):
            variables["unstacked"] = unstacked
        return in_compute_dtype(variables, config)

    def empty(self, rows: int, source_length: int) -> Slots:
        """Returns slots without work, for sources of up to `source_length` tokens."""
        return self._empty(self.variables, rows, source_length)

    def _call(self, program: Callable[..., Any], *inputs: Any) -> Any:
        """Returns what a program makes of the model and inputs; experts on disk are read for it."""
        return run_reading(self.variables, lambda: program(self.variables, *inputs))[0]

    def admit(self, slots: Slots, rows: Mapping[int, Row], batch: int) -> Slots:
        """Encodes up to `batch` sources and puts them into slots, by number; a program is compiled for each `batch`."""
        R, S = slots.mask.shape
        ids, mask = np.zeros((2, batch, S), np.int32)
        mask[len(rows) :, 0] = 1  # rows that only fill the batch: a source needs a token
        where = np.full(batch, R, np.int32)  # past the end: nothing is written
        draws = np.zeros((batch, 3), np.uint32)
        limit, greedy, numbers = np.ones(batch, np.int32), np.ones(batch, bool), {n: np.full(batch, x) for n, x in _NEUTRAL.items()}
        for i, (slot, row) in enumerate(rows.items()):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, 1
            where[i], draws[i] = slot, row.draws
            limit[i], greedy[i] = row.controls.max_new_tokens, not row.controls.do_sample
            for name, number in numbers_of(row.controls, self.decoder.config.vocab_size).items():
                numbers[name][i] = number
        return self._call(self._admit, slots, ids, mask.astype(bool), where, draws, (limit, greedy, numbers))

    def run(
        self, slots: Slots, active: np.ndarray, steps: int, level: int, scored: bool, wanted: bool = False
    ) -> tuple[Slots, Report]:
        """Takes up to `steps` steps of the first len(active) slots, fewer where all that are active end before.

        level: the highest `level_of` the active rows. scored: whether log-probabilities are noted. wanted: whether somebody waits
        for a slot, so that the run ends with the first row. A program is compiled for each len(active).
        """
        settings = np.int32(steps), np.int32(level), np.bool_(scored), np.bool_(wanted)
        return self._call(self._run, slots, active, *settings)


def level_of(controls: GenerationConfig) -> int:
    """Returns what a step must do for a row with these controls."""
    if not controls.do_sample:
        return GREEDY
    return FILTERED if controls.top_p < 1.0 or controls.min_p is not None or controls.typical_p < 1.0 else SAMPLED


@functools.lru_cache(256)
def numbers_of(controls: GenerationConfig, vocab_size: int) -> dict[str, Any]:
    """Returns a row's values of controls; those that are off have values that change nothing."""
    found = {name: number for name, number in split_numbers(controls)[1].items() if name in _NEUTRAL}
    off = {name: _NEUTRAL[name] for name in ("top_p", "typical_p") if getattr(controls, name) >= 1.0}
    return {**found, **off, "top_k": np.int32(min(controls.top_k, vocab_size))}


_NEUTRAL = {
    "temperature": np.float32(1.0), "top_p": np.float32(2.0), "min_p": np.float32(0.0), "typical_p": np.float32(2.0),
    "repetition_penalty": np.float32(1.0), "min_new_tokens": np.int32(0), "top_k": np.int32(0),
}  # fmt: skip


def _levels(controls: GenerationConfig) -> tuple[GenerationConfig, ...]:
    """Returns the controls that shape a step at each level: values that rows differ in are on, as numbers of each row."""
    plain = dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=None, typical_p=1.0)
    greedy = split_numbers(dataclasses.replace(controls, **plain))[0]
    sampled = dataclasses.replace(greedy, do_sample=True, temperature=0.5, top_k=MOST_TOP_K)
    return greedy, sampled, dataclasses.replace(sampled, top_p=0.5, min_p=controls.min_p, typical_p=controls.typical_p)


def _empty(decoder: SwitchTransformer, controls: GenerationConfig, variables: Mapping[str, Any], rows: int, length: int) -> Slots:
    config, T = decoder.config, controls.max_new_tokens
    encoded = jnp.zeros((rows, length, config.d_model), config.dtype)
    alternatives = min(ALTERNATIVES, config.vocab_size)
    wide = jnp.zeros((rows, T, alternatives))
    return Slots(
        cache=RingCache.of(start_cache(decoder, variables, encoded, T)),
        source=jnp.zeros((rows, length), jnp.int32),
        mask=jnp.ones((rows, length), bool),
        progress=_begun(jnp.zeros((rows, 3), jnp.uint32), controls, config.vocab_size),
        wishes=Wishes(
            jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), {name: jnp.full(rows, value) for name, value in _NEUTRAL.items()}
        ),
        scores=Scores(jnp.zeros((rows, T)), wide, wide.astype(jnp.int32)),
    )


def _begun(draws: Integer[Array, "R 3"], controls: GenerationConfig, vocab_size: int) -> Progress:
    """Returns rows that hold the start token. Keys are those that `run_program` gives such rows."""

    assert controls.decoder_start_token_id is not None  # `for_model` has filled it in
    first = controls.decoder_start_token_id

    def one(draw: Integer[Array, "3"]) -> Progress:
        key = functools.reduce(jax.random.fold_in, (draw[1], draw[2]), jax.random.key(draw[0]))
        start = jnp.full((1, 1), first, jnp.int32)
        return _progress(start_rows(start, key[None], controls, vocab_size, 1 + controls.max_new_tokens))

    return jax.vmap(one)(draws)


def _progress(rows: Rows) -> Progress:
    """Returns how far a single row is."""
    return Progress(rows.tokens[0], rows.length, rows.finished[0], rows.keys[0])


def _admit(encoder, decoder, controls: GenerationConfig, variables, slots: Slots, ids, mask, where, draws, wishes) -> Slots:
    encoded = encoder.apply(variables, ids, mask, method="encode").last_hidden_state
    fresh = start_cache(decoder, variables, encoded, 1)

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), old, new)

    layers = tuple(
        dataclasses.replace(layer, source=put(layer.source, new.source))
        for layer, new in zip(slots.cache.layers, fresh.layers, strict=True)
    )
    cache = dataclasses.replace(slots.cache, layers=layers, lengths=slots.cache.lengths.at[where].set(0, mode="drop"))
    progress = put(slots.progress, _begun(draws, controls, decoder.config.vocab_size))
    source, mask, wishes = put(slots.source, ids), put(slots.mask, mask), put(slots.wishes, Wishes(*wishes))
    return dataclasses.replace(slots, cache=cache, source=source, mask=mask, progress=progress, wishes=wishes)


def _run(decoder, levels: tuple[GenerationConfig, ...], variables, slots: Slots, active, steps, level, scored, wanted):
    R, config = active.shape[0], decoder.config
    index, biases = slots.cache.index, slots.cache.biases
    unsplit = dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, index=jnp.zeros((1,), jnp.int32), biases=()))
    part = jax.tree.map(lambda x: x[:R], unsplit)  # the slots at work, which are the first
    cache = dataclasses.replace(part.cache, index=index, biases=biases)
    begun = part.progress._replace(finished=part.progress.finished | ~active)
    # With Hugging Face's capacity n-grams count padding too, as in `run_program`.
    source_mask = None if config.capacity_mode == "fixed" else part.mask
    greedy, *sampled = levels
    extensions = [
        jax.vmap(functools.partial(_extended, greedy=greedy, sampled=one), in_axes=(0, 0, 0, None if source_mask is None else 0, 0))
        for one in (None, *sampled)
    ]

    def step(carry):
        number, rows, cache, scores = carry
        logits, cache = decode(decoder, variables, rows.newest, part.mask, cache)
        after = jax.lax.switch(level, extensions, rows, logits, part.source, source_mask, part.wishes)
        scores = jax.lax.cond(scored, _noted, lambda scores, *_: scores, scores, logits, rows, after)
        return number + 1, after, cache, scores

    def going(carry):
        ended = jnp.where(wanted, (carry[1].finished != begun.finished).any(), carry[1].finished.all())
        return (carry[0] < steps) & ~ended

    number, rows, cache, scores = jax.lax.while_loop(going, step, (jnp.int32(0), begun, cache, part.scores))

    def put(whole: Any, new: Any) -> Any:
        return jax.tree.map(lambda whole, new: new if whole.shape == new.shape else whole.at[:R].set(new), whole, new)

    layers = tuple(
        dataclasses.replace(layer, past=put(layer.past, new.past))
        for layer, new in zip(slots.cache.layers, cache.layers, strict=True)
    )
    cache = dataclasses.replace(slots.cache, layers=layers, index=cache.index, lengths=put(slots.cache.lengths, cache.lengths))
    after = dataclasses.replace(slots, cache=cache, progress=put(slots.progress, rows), scores=put(slots.scores, scores))
    return after, Report(rows.tokens[:, 1:], rows.length - 1, rows.finished, number, scores)


def _extended(
    row: Progress,
    logits: Float[Array, " V"],
    source: Int[Array, " S"],
    source_mask: Bool[Array, " S"] | None,
    wishes: Wishes,
    *,
    greedy: GenerationConfig,
    sampled: GenerationConfig | None,
) -> Progress:
    """Chooses the next token of one row, by `extend_rows`; a row that is finished stays as it is."""
    rows = Rows(row.tokens[None], row.length, row.finished[None], row.keys[None], None, jnp.bool_(False))
    history = History(rows.tokens, rows.length, 1, source[None], None if source_mask is None else source_mask[None])
    after = _progress(extend_rows(rows, logits[None], history, greedy, wishes.numbers))
    if sampled is not None:
        drawn = _progress(extend_rows(rows, logits[None], history, sampled, wishes.numbers))
        after = _either(wishes.greedy, after, drawn)
    after = after._replace(finished=after.finished | (after.length > wishes.limit))  # the start token does not count
    return _either(row.finished, row, after)


def _either(condition: Bool[Array, ""], this: Progress, that: Progress) -> Progress:
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), this, that)


def _noted(scores: Scores, logits: Float[Array, "R V"], before: Progress, after: Progress) -> Scores:
    """Writes the log-probabilities of the tokens that a step chose; for a finished row past its end."""
    R, T = scores.chosen.shape
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.take_along_axis(after.tokens, before.length[:, None], axis=1)
    best, best_ids = jax.lax.top_k(log_probs, scores.best.shape[2])
    where = (jnp.arange(R), jnp.where(before.finished, T, before.length - 1))
    return Scores(
        chosen=scores.chosen.at[where].set(jnp.take_along_axis(log_probs, token, axis=1)[:, 0], mode="drop"),
        best=scores.best.at[where].set(best, mode="drop"),
        best_ids=scores.best_ids.at[where].set(best_ids, mode="drop"),
    )
