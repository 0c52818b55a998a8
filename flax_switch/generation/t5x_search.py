"""T5X's beam search (`t5x/decoding.beam_search`): live beams beside a set of finished ones, and ties as there.

Unlike Hugging Face's, a beam that is not at its end when the length is used up does not count as finished: live beams are
returned, with their plain log-probabilities, only for a source none of whose beams has ended. Any of the candidates may end, not
only the first num_beams; scores are divided by ((5 + length) / 6)**alpha with the prefix's tokens counted (the start token not);
and the search goes on until no live beam could be better than the worst finished one, at the greatest length. A source is then left
as it is; in T5X it goes on with its batch, which can reorder ties, so a row there is that of a batch of one here.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.beam_search import Beams, start_beams, take, top_k
from flax_switch.generation.logits import History, process_scores

NEVER = -1.0e7  # T5X's; what is added to it is rounded, and so are the ties among what must not be chosen


def start_live(prefix: Int[Array, "B P"], keys: Key[Array, " B"], controls: GenerationConfig, vocab_size: int) -> Beams:
    """Returns live beams, worst first as T5X keeps them, that hold the decoder's prefix. Only one counts until they differ."""
    beams = start_beams(prefix, keys, controls, vocab_size)
    J, P = controls.num_beams, prefix.shape[1]
    ended = jnp.arange(beams.tokens.shape[2])[None, None] >= P
    tokens = jnp.where(ended, controls.pad_token_id or 0, beams.tokens)
    first = 0 if P == 1 else J - 1  # T5X's first beam; after a prefix, which it goes through step by step, the last
    scores = jnp.where(jnp.arange(J)[None] == first, 0.0, NEVER)
    return dataclasses.replace(
        beams,
        tokens=tokens,
        scores=jnp.broadcast_to(scores, beams.scores.shape),
        finished_tokens=tokens,
        finished_scores=jnp.full_like(beams.finished_scores, NEVER),
    )


def extend_live(
    beams: Beams, logits: Float[Array, "R V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Beams:
    """Takes one step: of the best continuations of all live beams some end and num_beams go on."""
    B, J, T = beams.tokens.shape
    log_probs = process_scores(jax.nn.log_softmax(logits, axis=-1), history, controls, numbers)
    total = (log_probs.reshape(B, J, -1) + beams.scores[..., None]).reshape(B, -1)
    scores, choice = top_k(total, controls.num_candidates)
    parent, token = jnp.divmod(choice, log_probs.shape[-1])  # [B, candidates]
    tokens = jax.lax.dynamic_update_slice_in_dim(
        take(beams.tokens, parent), token[..., None].astype(jnp.int32), beams.length, axis=2
    )
    ends = jnp.isin(token, jnp.asarray(controls.eos_token_id))
    live_scores, live = jax.lax.top_k(scores + ends * NEVER, J)
    live_scores, live = jnp.flip(live_scores, axis=1), jnp.flip(live, axis=1)
    own = jnp.broadcast_to(jnp.arange(J, dtype=jnp.int32)[None, :, None], (B, J, 1))
    ancestors = take(beams.ancestors, take(parent, live))
    ancestors = jax.lax.dynamic_update_slice_in_dim(ancestors, own, jnp.minimum(beams.length, T - 1), axis=2)
    step_scores, new_tokens = beams.step_scores, beams.length + 1 - history.prefix_length
    if step_scores is not None:
        step_scores = jax.lax.dynamic_update_index_in_dim(step_scores, log_probs, new_tokens - 1, axis=0)
    extended = dataclasses.replace(beams, tokens=take(tokens, live), scores=live_scores)
    extended = _settled_left_alone(beams, _finish(extended, tokens, scores, ends, new_tokens, numbers))
    # The greatest length is one more than there are tokens after the start token, as in T5X, where it counts that token.
    best_live = extended.scores[:, -1:] / _penalty(T, numbers)
    worst = jnp.where(extended.is_finished, extended.finished_scores.min(axis=1, keepdims=True), NEVER)
    nothing_better, nothing_left = (worst > best_live).all(axis=1), best_live[:, 0] < NEVER / _penalty(T, numbers)
    improvable = beams.improvable & ~(nothing_better | nothing_left)
    return dataclasses.replace(
        extended,
        ancestors=ancestors,
        improvable=improvable,
        length=beams.length + 1,
        step_scores=step_scores,
        done=~improvable.any() | (new_tokens >= controls.max_new_tokens),
    )


def best_found(beams: Beams, prefix_length: int) -> Beams:
    """Returns the beams with what T5X returns among the finished ones, best first; a place without one scores -1e7."""
    any_finished = beams.is_finished.any(axis=1, keepdims=True)
    lengths = jnp.broadcast_to(beams.length - prefix_length, beams.finished_lengths.shape)
    tokens = jnp.where(any_finished[..., None], beams.finished_tokens, beams.tokens)
    scores = jnp.where(any_finished, beams.finished_scores, beams.scores)
    lengths = jnp.where(any_finished, beams.finished_lengths, lengths)
    tokens, scores, lengths = (jnp.flip(x, axis=1) for x in (tokens, scores, lengths))
    return dataclasses.replace(beams, finished_tokens=tokens, finished_scores=scores, finished_lengths=lengths)


def _finish(
    beams: Beams, tokens: Int[Array, "B C T"], scores: Float[Array, "B C"], ends: Bool[Array, "B C"], new_tokens, numbers
) -> Beams:
    """Puts candidates that end among the finished beams where they are better; worst first."""
    scores = scores / _penalty(beams.length, numbers) + ~ends * NEVER
    lengths = jnp.broadcast_to(new_tokens, ends.shape)
    _, best = jax.lax.top_k(jnp.concatenate([beams.finished_scores, scores], axis=1), beams.scores.shape[1])
    best = jnp.flip(best, axis=1)
    return dataclasses.replace(
        beams,
        finished_tokens=take(jnp.concatenate([beams.finished_tokens, tokens], axis=1), best),
        finished_scores=take(jnp.concatenate([beams.finished_scores, scores], axis=1), best),
        finished_lengths=take(jnp.concatenate([beams.finished_lengths, lengths], axis=1), best),
        is_finished=take(jnp.concatenate([beams.is_finished, ends], axis=1), best),
    )


def _settled_left_alone(beams: Beams, extended: Beams) -> Beams:
    """Returns the extended beams, but of sources whose search is over what they were: batch mates do not change them."""
    changed = ("tokens", "scores", "finished_tokens", "finished_scores", "finished_lengths", "is_finished")
    pairs = {name: (getattr(extended, name), getattr(beams, name)) for name in changed}
    kept = {name: jnp.where(jnp.expand_dims(beams.improvable, range(1, x.ndim)), x, old) for name, (x, old) in pairs.items()}
    return dataclasses.replace(extended, **kept)


def _penalty(length: Int[Array, ""] | int, numbers: Mapping[str, Array]) -> Float[Array, ""]:
    """Returns what log-probabilities of sequences of this length are divided by; the start token does not count."""
    return jnp.power((5.0 + length) / 6.0, numbers["brevity_penalty"])
