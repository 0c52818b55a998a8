"""Beam search with Hugging Face's bookkeeping: running beams, finished ones, and when to stop."""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flax_switch.config.generation import GenerationConfig, as_ids
from flax_switch.generation.logits import History, process_scores

NEVER = -1e9  # added to the score of what must not be chosen; finite, so that it still compares


@flax.struct.dataclass
class Beams:
    """The state of a beam search for B sources with `num_beams` beams (J) each."""

    tokens: Int[Array, "B J T"]  # of running beams, best first, filled up to `length`
    scores: Float[Array, "B J"]  # their summed log-probabilities
    ancestors: Int[Array, "B J T"]  # the beam whose cache holds a beam's past, place by place
    finished_tokens: Int[Array, "B J T"]  # best first; filled up with EOS, as Hugging Face pads
    finished_scores: Float[Array, "B J"]  # divided by the length penalty
    finished_lengths: Int[Array, "B J"]  # new tokens
    is_finished: Bool[Array, "B J"]  # whether the place holds a finished beam
    improvable: Bool[Array, " B"]  # whether a running beam may still beat the finished ones
    length: Int[Array, ""]
    keys: Key[Array, " B"]
    step_scores: Float[Array, "steps R V"] | None
    done: Bool[Array, ""]

    @property
    def newest(self) -> Int[Array, " R"]:
        """The tokens that the decoder has not seen yet."""
        return jax.lax.dynamic_index_in_dim(self.tokens, self.length - 1, axis=2, keepdims=False).reshape(-1)

    def going(self, controls: GenerationConfig) -> Bool[Array, " B"]:
        """Returns for which sources what is found may still change."""
        return self.improvable & ~self.is_finished.all(axis=1) if controls.early_stopping is True else self.improvable

    def alive(self, controls: GenerationConfig) -> Bool[Array, " R"]:
        """Returns which beams are possible and may still change what is found for their source."""
        return (self.going(controls)[:, None] & (self.scores > -jnp.inf)).reshape(-1)


def start_beams(prefix: Int[Array, "B P"], keys: Key[Array, " B"], controls: GenerationConfig, vocab_size: int) -> Beams:
    """Returns beams that hold the decoder's prefix. Only the first counts until they differ."""
    B, P = prefix.shape
    J = controls.group_size
    # Hugging Face fills with EOS where the pad id is 0, which it takes for none, and else with pad; groups always with pad.
    fill = controls.pad_token_id if controls.num_beam_groups > 1 else controls.pad_token_id or as_ids(controls.eos_token_id)[0]
    tokens = jnp.pad(prefix, ((0, 0), (0, controls.max_new_tokens)), constant_values=fill)
    tokens = jnp.broadcast_to(tokens[:, None], (B, J, tokens.shape[1]))
    own = jnp.broadcast_to(jnp.arange(J, dtype=jnp.int32)[None, :, None], tokens.shape)
    return Beams(
        tokens=tokens,
        scores=jnp.broadcast_to(jnp.where(jnp.arange(J) == 0, 0.0, NEVER)[None], (B, J)),
        # A prefix of several tokens is computed once, at beam 0; a single one as each beam's first step.
        ancestors=own if P == 1 else jnp.where(jnp.arange(tokens.shape[2])[None, None] < P, 0, own),
        finished_tokens=tokens,
        finished_scores=jnp.full((B, J), NEVER),
        finished_lengths=jnp.zeros((B, J), jnp.int32),
        is_finished=jnp.zeros((B, J), bool),
        improvable=jnp.ones(B, bool),
        length=jnp.int32(P),
        keys=keys,
        step_scores=jnp.zeros((controls.max_new_tokens, B * J, vocab_size)) if controls.output_scores else None,
        done=jnp.bool_(False),
    )


def extend_beams(
    beams: Beams, logits: Float[Array, "R V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Beams:
    """Takes one step: of the best continuations of all beams some end and num_beams go on."""
    B, J, _ = beams.tokens.shape
    log_probs = process_scores(jax.nn.log_softmax(logits, axis=-1), history, controls, numbers)
    total = (log_probs.reshape(B, J, -1) + beams.scores[..., None]).reshape(B, -1)
    scores, choice = _candidates(total, beams, controls)
    parent, token = jnp.divmod(choice, log_probs.shape[-1])  # [B, candidates]
    tokens = take(beams.tokens, parent)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None].astype(jnp.int32), beams.length, axis=2)
    new_tokens = beams.length + 1 - history.prefix_length
    last_step = new_tokens >= controls.max_new_tokens
    is_end = jnp.isin(token, jnp.asarray(controls.eos_token_id))
    ends = is_end | last_step

    # The best candidates that do not end go on.
    running_scores, running = jax.lax.top_k(scores + is_end * NEVER, J)
    own = jnp.broadcast_to(jnp.arange(J, dtype=jnp.int32)[None, :, None], (B, J, 1))
    ancestors = take(beams.ancestors, take(parent, running))
    ancestors = jax.lax.dynamic_update_slice_in_dim(ancestors, own, jnp.minimum(beams.length, tokens.shape[2] - 1), axis=2)

    # In Hugging Face's diverse search a group's best candidate counts though it ends, and what runs at the end is finished last.
    grouped = controls.num_beam_groups > 1
    beams = _finish(beams, tokens, scores, is_end if grouped else ends, new_tokens, controls, numbers)
    best = scores if grouped else running_scores
    improvable = beams.improvable & _may_improve(beams, best, new_tokens, controls, numbers)
    if grouped:
        beams, left = dataclasses.replace(beams, improvable=improvable), jnp.broadcast_to(last_step, running.shape)
        beams = _finish(beams, take(tokens, running), running_scores, left, new_tokens, controls, numbers)
    enough = beams.is_finished.all() if controls.early_stopping is True else jnp.bool_(False)
    step_scores = beams.step_scores
    if step_scores is not None:
        step_scores = jax.lax.dynamic_update_index_in_dim(step_scores, log_probs, new_tokens - 1, axis=0)
    return dataclasses.replace(
        beams,
        tokens=take(tokens, running),
        scores=running_scores,
        ancestors=ancestors,
        improvable=improvable,
        length=beams.length + 1,
        step_scores=step_scores,
        done=~improvable.any() | enough | ends.all(),
    )


def _candidates(
    total: Float[Array, "B JV"], beams: Beams, controls: GenerationConfig
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Returns scores and places of the best continuations; with sampling, of continuations drawn without replacement."""
    if not controls.do_sample:
        return top_k(total, controls.num_candidates)
    keys = jax.vmap(jax.random.fold_in, (0, None))(beams.keys, beams.length)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, total.shape[1:]))(keys)
    _, choice = top_k(total + noise, controls.num_candidates)  # the largest perturbed scores: a draw without replacement
    return jnp.take_along_axis(total, choice, axis=1), choice


def _finish(beams, tokens, scores, ends, new_tokens, controls: GenerationConfig, numbers) -> Beams:
    """Puts candidates that end among the finished beams where they are better. Only the first num_beams candidates may."""
    J = controls.group_size
    ends = ends & (jnp.arange(ends.shape[1])[None] < J)
    scores = scores / numbers["length_divisors"][new_tokens]
    if controls.early_stopping is True:
        scores += beams.is_finished.all(-1, keepdims=True) * NEVER
    scores += ~beams.improvable[:, None] * NEVER
    scores += ~ends * NEVER
    lengths = jnp.broadcast_to(new_tokens, ends.shape)
    best_scores, best = jax.lax.top_k(jnp.concatenate([beams.finished_scores, scores], axis=1), J)
    return dataclasses.replace(
        beams,
        finished_tokens=take(jnp.concatenate([beams.finished_tokens, tokens], axis=1), best),
        finished_scores=best_scores,
        finished_lengths=take(jnp.concatenate([beams.finished_lengths, lengths], axis=1), best),
        is_finished=take(jnp.concatenate([beams.is_finished, ends], axis=1), best),
    )


def _may_improve(beams: Beams, best_scores, new_tokens, controls: GenerationConfig, numbers) -> Bool[Array, " B"]:
    """Returns whether a beam with the first of the best scores could still be better than the worst finished one.

    Its score is judged at its present length; with early_stopping="never" at the longest, if that is more favourable. Places
    that no beam has finished in count as never.
    """
    hopeful = controls.early_stopping == "never" and controls.length_penalty > 0.0
    divisor = numbers["length_divisors"][controls.max_new_tokens if hopeful else new_tokens]
    best_running = best_scores[:, :1] / divisor
    worst_finished = jnp.where(beams.is_finished, beams.finished_scores.min(-1, keepdims=True), NEVER)
    return (best_running > worst_finished).any(-1)


def take(x: Array, index: Int[Array, "B N"]) -> Array:
    """Returns x[b, index[b, n]]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def top_k(x: Float[Array, "B M"], k: int, chunk: int = 128) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns `jax.lax.top_k`, ties included, in two rounds: the k best of M lie in the k chunks with the largest maxima."""
    M = x.shape[1]
    if 4 * k * chunk > M:
        values, place = jax.lax.top_k(x, k)
        return values, place
    chunks = jnp.pad(x, ((0, 0), (0, -M % chunk)), constant_values=-jnp.inf).reshape(x.shape[0], -1, chunk)
    _, best = jax.lax.top_k(chunks.max(-1), k)
    best = jnp.sort(best, axis=-1)  # in order, so that of equal values the first still wins
    values, place = jax.lax.top_k(take(chunks, best).reshape(x.shape[0], -1), k)
    return values, take(best, place // chunk) * chunk + place % chunk
