"""What changes the scores of the next token: each control a function on scores [R, V], applied in Hugging Face's order.

R are the rows of a batch: sources, times beams or samples. Scores are logits, or with beams log-probabilities; forbidden tokens
get -inf. Rows' tokens so far are given as a buffer of static length and the number of places that are filled.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config.generation import GenerationConfig, as_ids
from flax_switch.ops import Size


@flax.struct.dataclass
class History:
    """The tokens that rows hold so far, the prefix included, and the sources they come from."""

    tokens: Int[Array, "R T"]
    length: Int[Array, ""]  # places filled
    prefix_length: Size = flax.struct.field(pytree_node=False)
    source: Int[Array, "B S"]  # R is a multiple of B; rows of a source are neighbours
    source_mask: Bool[Array, "B S"] | None  # False where n-grams of the source do not count; None: all count
    allowed: Bool[Array, "R V"] | None = None  # what a function of the prefix allows next; None: there is none
    said: Float[Array, "R V"] | None = None  # how many beams of former groups say a token; None: there are no groups


def process_scores(
    scores: Float[Array, "R V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Float[Array, "R V"]:
    """Applies all controls that are on; `numbers` holds their values (see `controls.split_numbers`)."""
    V = scores.shape[-1]
    new_tokens = history.length - history.prefix_length
    if history.said is not None:
        scores = scores - numbers["diversity_penalty"] * history.said
    if controls.repetition_penalty != 1.0:
        scores = penalise_repetition(scores, history.tokens, history.length, numbers["repetition_penalty"])
    if controls.no_repeat_ngram_size:
        scores = forbid(scores, repeated_ngrams(history, controls.no_repeat_ngram_size, V))
    if controls.encoder_no_repeat_ngram_size:
        scores = forbid(scores, source_ngrams(history, controls.encoder_no_repeat_ngram_size, V))
    # EOS alone cannot be a bad word.
    bad_words: tuple[tuple[int, ...], ...] = controls.bad_words_ids or ()
    ends = {(token,) for token in as_ids(controls.eos_token_id)}
    words = [word for word in bad_words if word not in ends]
    for size in sorted({len(word) for word in words}):
        scores = forbid(scores, completed_words(history, [word for word in words if len(word) == size], V))
    if controls.min_new_tokens:
        scores = forbid(scores, (one_of_tokens(as_ids(controls.eos_token_id), V) & (new_tokens < numbers["min_new_tokens"]))[None])
    if history.allowed is not None:
        scores = keep_allowed(scores, history.allowed, controls.group_size)
    if controls.forced_bos_token_id is not None and history.prefix_length == 1:
        scores = jnp.where(new_tokens == 0, force((controls.forced_bos_token_id,), V)[None], scores)
    if controls.forced_eos_token_id is not None:
        last = new_tokens == controls.max_new_tokens - 1
        scores = jnp.where(last, force(as_ids(controls.forced_eos_token_id), V)[None], scores)
    if controls.suppress_tokens:
        scores = forbid(scores, one_of_tokens(controls.suppress_tokens, V)[None])
    if controls.begin_suppress_tokens:
        # With a forced first token, what begins the sequence is the second.
        begin = int(history.prefix_length == 1 and controls.forced_bos_token_id is not None)
        scores = forbid(scores, (one_of_tokens(controls.begin_suppress_tokens, V) & (new_tokens == begin))[None])
    if controls.do_sample:
        scores = filter_scores(scores, controls, numbers)
    return scores


def filter_scores(scores: Float[Array, "R V"], controls: GenerationConfig, numbers: Mapping[str, Array]) -> Float[Array, "R V"]:
    """Applies sampling's temperature and filters, in Hugging Face's order. Beams keep a token beside every EOS token."""
    keep = 1 if controls.num_beams == 1 else len(as_ids(controls.eos_token_id)) + 1
    if controls.temperature != 1.0:
        scores = scores / numbers["temperature"]
    if controls.top_k:
        scores = keep_top_k(scores, max(controls.top_k, keep), numbers.get("top_k"))
    if controls.top_p < 1.0:
        scores = keep_top_p(scores, numbers["top_p"], keep)
    if controls.min_p is not None:
        scores = keep_min_p(scores, numbers["min_p"], keep)
    if controls.typical_p < 1.0:
        scores = keep_typical(scores, numbers["typical_p"], keep)
    return scores


def forbid(scores: Float[Array, "R V"], tokens: Bool[Array, "#R V"]) -> Float[Array, "R V"]:
    """Gives `tokens` the score -inf."""
    return jnp.where(tokens, -jnp.inf, scores)


def keep_allowed(scores: Float[Array, "R V"], allowed: Bool[Array, "R V"], beams: int) -> Float[Array, "R V"]:
    """Keeps what is allowed; for a source of whose beams other controls have forbidden all of it, with the score 0."""
    kept = forbid(scores, ~allowed)
    possible = jnp.repeat((kept > -jnp.inf).reshape(-1, beams * kept.shape[1]).any(axis=1), beams)
    return jnp.where(possible[:, None], kept, jnp.where(allowed, 0.0, -jnp.inf))


def force(ids: tuple[int, ...], vocab_size: int) -> Float[Array, " V"]:
    """Returns scores that leave only `ids`, all with 0."""
    return jnp.where(one_of_tokens(ids, vocab_size), 0.0, -jnp.inf)


def one_of_tokens(ids: tuple[int, ...], vocab_size: int) -> Bool[Array, " V"]:
    """Returns which tokens are among `ids`."""
    mask = np.zeros(vocab_size, bool)
    mask[list(ids)] = True
    return jnp.asarray(mask)


def marked(ids: Int[Array, "R T"], where: Bool[Array, "R T"], vocab_size: int) -> Bool[Array, "R V"]:
    """Returns which tokens occur among each row's `ids` at a place where `where` holds."""
    rows = jnp.arange(ids.shape[0])[:, None]
    ids = jnp.where(where, ids, vocab_size)  # out of bounds: dropped
    return jnp.zeros((ids.shape[0], vocab_size), bool).at[rows, ids].set(True, mode="drop")


def penalise_repetition(
    scores: Float[Array, "R V"], tokens: Int[Array, "R T"], length: Int[Array, ""], penalty: Float[Array, ""]
) -> Float[Array, "R V"]:
    """Divides positive scores of tokens already there by `penalty` and multiplies negative ones by it (CTRL, 1909.05858)."""
    filled = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < length, tokens.shape)
    penalised = jnp.where(scores < 0, scores * penalty, scores / penalty)
    return jnp.where(marked(tokens, filled, scores.shape[-1]), penalised, scores)


def repeated_ngrams(history: History, size: int, vocab_size: int) -> Bool[Array, "R V"]:
    """Returns tokens that would complete an n-gram the row already holds."""
    ends = jnp.arange(history.tokens.shape[1])[None]
    complete = (ends >= size - 1) & (ends < history.length)
    return marked(history.tokens, _matches(history.tokens, history, size) & complete, vocab_size)


def source_ngrams(history: History, size: int, vocab_size: int) -> Bool[Array, "R V"]:
    """Returns tokens that would complete an n-gram of the row's source."""
    rows = history.tokens.shape[0] // history.source.shape[0]
    source = jnp.repeat(history.source, rows, axis=0)
    complete = (jnp.arange(source.shape[1])[None] >= size - 1) & (history.length >= size - 1)
    if history.source_mask is not None:
        counted = jnp.repeat(history.source_mask, rows, axis=0)
        for i in range(size):
            complete = complete & _shifted(counted, i)
    return marked(source, _matches(source, history, size) & complete, vocab_size)


def _matches(text: Int[Array, "R S"], history: History, size: int) -> Bool[Array, "R S"]:
    """Returns where the n - 1 tokens before a place of `text` are the row's last n - 1 tokens."""
    matches = jnp.ones(text.shape, bool)
    if size - 1 > history.tokens.shape[1]:
        return ~matches
    last = _last_tokens(history, size - 1)
    for i in range(1, size):
        matches &= _shifted(text, i) == last[:, size - 1 - i, None]
    return matches


def _shifted(x: Array, by: int) -> Array:
    """Returns x with every place holding what stood `by` places before; the first places hold 0 (False)."""
    return jnp.pad(x, ((0, 0), (by, 0)))[:, : x.shape[1]]


def completed_words(history: History, words: list[tuple[int, ...]], vocab_size: int) -> Bool[Array, "R V"]:
    """Returns the last token of each of `words`, all of one length, for rows that end in the tokens before it."""
    size = len(words[0])
    rows, T = history.tokens.shape
    starts, ends = np.array([word[:-1] for word in words]), np.array([word[-1] for word in words])
    matches = jnp.ones((rows, len(words)), bool)
    if size > T:
        matches = jnp.zeros_like(matches)
    elif size > 1:
        last = _last_tokens(history, size - 1)
        matches = (last[:, None] == starts[None]).all(-1) & (history.length >= size - 1)
    return marked(jnp.broadcast_to(ends, matches.shape), matches, vocab_size)


def _last_tokens(history: History, number: int) -> Int[Array, "R number"]:
    return jax.lax.dynamic_slice_in_dim(history.tokens, history.length - number, number, axis=1)


def keep_top_k(scores: Float[Array, "R V"], k: int, fewer: Int[Array, ""] | None = None) -> Float[Array, "R V"]:
    """Keeps the k best tokens, and whatever ties with the last of them.

    fewer: how many instead, from 1 to k, where a program serves several numbers; 0 keeps all.
    """
    best = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0]
    if fewer is None:
        return forbid(scores, scores < best[:, -1:])
    last = jax.lax.dynamic_slice_in_dim(best, jnp.maximum(fewer, 1) - 1, 1, axis=1)
    return forbid(scores, (scores < last) & (fewer > 0))


def keep_top_p(scores: Float[Array, "R V"], p: Float[Array, ""], keep: int = 1) -> Float[Array, "R V"]:
    """Keeps the fewest most probable tokens that together reach probability p (1904.09751), `keep` of them at least.

    Tokens of equal score are kept or not together.
    """
    ascending = jnp.sort(scores, axis=-1)
    cumulative = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (cumulative > 1.0 - p).at[:, -keep:].set(True)
    lowest = jnp.where(kept, ascending, jnp.inf).min(-1, keepdims=True)
    return forbid(scores, scores < lowest)


def keep_min_p(scores: Float[Array, "R V"], p: Float[Array, ""], keep: int = 1) -> Float[Array, "R V"]:
    """Keeps tokens at least p times as probable as the most probable one, `keep` of them at least."""
    probs = jax.nn.softmax(scores, axis=-1)
    best = jax.lax.top_k(probs, min(keep, probs.shape[-1]))[0]
    return forbid(scores, probs < jnp.minimum(p * best[:, :1], best[:, -1:]))


def keep_typical(scores: Float[Array, "R V"], mass: Float[Array, ""], keep: int = 1) -> Float[Array, "R V"]:
    """Keeps the tokens whose surprise is nearest to the entropy, up to probability `mass` (2202.00666), `keep` at least."""
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.where(probs > 0, log_probs * probs, 0.0).sum(-1, keepdims=True)
    distance = jnp.abs(-log_probs - entropy)
    ascending, ordered = jax.lax.sort((distance, probs), num_keys=1)
    last = (jnp.cumsum(ordered, axis=-1) < mass).sum(-1, keepdims=True)
    last = jnp.clip(last, keep - 1, scores.shape[-1] - 1)
    return forbid(scores, distance > jnp.take_along_axis(ascending, last, axis=-1))
