"""Contrastive search (Su et al., 2202.06417): the next token is probable, and brings the decoder to a state unlike its former ones.

The decoder runs on the top_k most probable tokens of each source, side by side, and the one is taken for which
(1 - penalty_alpha) * probability - penalty_alpha * (the greatest cosine of its state and a former state) is greatest. In the cache
the candidates are a group of rows that read each other's past: at every place, that of the token which was taken there.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.beam_search import take
from flax_switch.generation.logits import History, process_scores
from flax_switch.ops import Size


@flax.struct.dataclass
class Candidates:
    """The state of a contrastive search for B sources with K candidates each; the decoder has seen all `tokens`."""

    tokens: Int[Array, "B T"]  # filled up to `length`; pad beyond
    length: Int[Array, ""]
    finished: Bool[Array, " B"]
    candidates: Int[Array, "B K"]  # for the next place, most probable first
    probs: Float[Array, "B K"]
    states: Float[Array, "B T D"]  # directions of the decoder's states at `tokens`
    counts: Bool[Array, "B T"]  # False at padding
    taken: Int[Array, "B T"]  # the number of the candidate whose cache holds a place
    scores: Float[Array, "steps B V"] | None  # processed, by step, where asked for
    done: Bool[Array, ""]

    @property
    def newest(self) -> Int[Array, " R"]:
        """The tokens that the decoder has not seen yet."""
        return self.candidates.reshape(-1)

    @property
    def ancestors(self) -> Int[Array, "B K T"]:
        """The candidate whose cache holds a row's past, place by place; at the next place, its own."""
        (B, K), T = self.candidates.shape, self.tokens.shape[1]
        own = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None, :, None], (B, K, T))
        return jnp.where((jnp.arange(T) == self.length)[None, None], own, self.taken[:, None])

    def alive(self, controls: GenerationConfig) -> Bool[Array, " B"]:
        """Returns which sources another token is looked for."""
        return ~self.finished & (self.length < self.tokens.shape[1])


def start_candidates(
    prefix: Int[Array, "B P"],
    states: Float[Array, "B P D"],
    counts: Bool[Array, "B P"],
    controls: GenerationConfig,
    vocab_size: int,
    max_length: Size,
) -> Candidates:
    """Returns sources with the decoder's prefix and its states there, still without candidates."""
    (B, P), K = prefix.shape, controls.rows_together
    new = max_length - P
    return Candidates(
        tokens=jnp.pad(prefix, ((0, 0), (0, new)), constant_values=controls.pad_token_id),
        length=jnp.int32(P),
        finished=jnp.zeros(B, bool),
        candidates=jnp.zeros((B, K), jnp.int32),
        probs=jnp.zeros((B, K)),
        states=jnp.pad(_directions(states), ((0, 0), (0, new), (0, 0))),
        counts=jnp.pad(counts, ((0, 0), (0, new)), constant_values=True),
        taken=jnp.zeros((B, max_length), jnp.int32),
        scores=jnp.zeros((controls.max_new_tokens, B, vocab_size)) if controls.output_scores else None,
        done=jnp.bool_(False),
    )


def propose(
    found: Candidates, logits: Float[Array, "B V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Candidates:
    """Returns the state with candidates for the next place: the most probable tokens of the processed scores."""
    scores = process_scores(logits, history, controls, numbers)
    probs, candidates = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), controls.rows_together)
    step = found.length - history.prefix_length
    kept = None if found.scores is None else found.scores.at[step].set(scores, mode="drop")  # after the last token none is kept
    return dataclasses.replace(found, candidates=candidates, probs=probs, scores=kept)


def choose(
    found: Candidates,
    logits: Float[Array, "R V"],
    states: Float[Array, "R 1 D"],
    controls: GenerationConfig,
    numbers: Mapping[str, Array],
) -> tuple[Candidates, Float[Array, "B V"]]:
    """Returns the state with one of the candidates taken, and the logits after it; rows are all candidates of all sources."""
    (B, K), T = found.candidates.shape, found.tokens.shape[1]
    directions = _directions(states.reshape(B, K, -1))
    alike = jnp.einsum("BKD,BTD->BKT", directions, found.states, precision=jax.lax.Precision.HIGHEST)
    former = found.counts & (jnp.arange(T)[None] < found.length)
    alike = jnp.where(former[:, None], alike, -jnp.inf).max(axis=-1)
    alpha = numbers["penalty_alpha"]
    best = jnp.argmax((1.0 - alpha) * found.probs - alpha * alike, axis=-1, keepdims=True).astype(jnp.int32)
    assert controls.pad_token_id is not None  # `for_model` has filled it in
    token = jnp.where(found.finished, controls.pad_token_id, take(found.candidates, best)[:, 0])
    finished = found.finished | jnp.isin(token, jnp.asarray(controls.eos_token_id))

    def put(whole: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, new, found.length, axis=1)

    after = dataclasses.replace(
        found,
        tokens=put(found.tokens, token[:, None]),
        length=found.length + 1,
        finished=finished,
        states=put(found.states, take(directions, best)),
        taken=put(found.taken, best),
        done=finished.all() | (found.length + 1 >= T),
    )
    return after, take(logits.reshape(B, K, -1), best)[:, 0]


def _directions(states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns states in float32, of length 1."""
    states = states.astype(jnp.float32)
    return states / jnp.linalg.norm(states, axis=-1, keepdims=True)
