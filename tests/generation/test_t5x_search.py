"""T5X's beam search beside a retelling of it in plain Python, on tables of next tokens and on a model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import BASE, Uncached, lively_params, sources
from t5x_retelling import beam_search
from textbook import beam_search as huggingface_beam_search

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.generation import make_controls, split_numbers
from flax_switch.generation.generate import generate
from flax_switch.generation.logits import History
from flax_switch.generation.t5x_search import best_found, extend_live, start_live
from flax_switch.nn.transformer import SwitchTransformer

EOS, START = 1, 0
ALPHAS = (0.0, 0.6, 1.0)


def one_sure(rng, V, below):
    """One sure token in every row, the others 20 below and less: their log-probabilities are these numbers, exactly, and tie."""
    logits = -20.0 - below((V, V, V))
    np.put_along_axis(logits, rng.integers(0, V, (V, V, 1)), 0.0, axis=-1)
    return logits


def normal(rng, V, eos):
    """Random logits, with EOS favoured by so much."""
    logits = rng.normal(0.0, 1.5, (V, V, V))
    logits[..., EOS] += eos
    return logits


# Logits of the next token by the last two, [V, V, V]. Ties are exact whatever library takes the logarithms.
KINDS = {
    "any": lambda rng, V: normal(rng, V, 0.0),
    "many end": lambda rng, V: normal(rng, V, 1.5),
    "everything ends at once": lambda rng, V: normal(rng, V, 40.0),
    "nothing ends": lambda rng, V: normal(rng, V, -60.0),
    "EOS is impossible": lambda rng, V: normal(rng, V, -np.inf),
    "ties": lambda rng, V: one_sure(rng, V, lambda shape: rng.integers(0, 4, shape)),
    "ties by rounding": lambda rng, V: one_sure(rng, V, lambda shape: rng.integers(0, 8, shape) / 4),  # of -1e7 and a quarter
    "all alike": lambda rng, V: np.zeros((V, V, V)),
}
EACH = 3  # tables of a kind

# vocabulary, num_beams, max_new_tokens, prefix: a program each
SHAPES = [
    (9, 3, 8, (START,)),
    (12, 4, 6, (START, 5, 3)),
    (7, 2, 7, (START, 4)),
    (3, 4, 5, (START,)),  # 3 candidates where 8 are kept
    (4, 5, 4, (START, 2, 3)),
    (2, 2, 3, (START,)),
    (5, 3, 2, (START, 3)),
    (6, 5, 1, (START,)),
]


def tables(V, seed):
    rng = np.random.default_rng(seed)
    return np.stack([make(rng, V) for make in KINDS.values() for _ in range(EACH)]).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def search(logits, numbers, settings, prefix):
    """Tokens, scores and counts of new tokens that a whole search over a table [B, V, V, V] finds."""
    B, V, P = len(logits), logits.shape[-1], len(prefix)

    def step(state):
        tokens = state.tokens
        last, before = tokens[:, :, state.length - 1], jnp.where(state.length > 1, tokens[:, :, state.length - 2], START)
        rows = logits[jnp.arange(B)[:, None], before, last].reshape(-1, V)
        history = History(tokens.reshape(len(rows), -1), state.length, P, jnp.ones((B, 1), jnp.int32), None)
        return extend_live(state, rows, history, settings, numbers)

    start = start_live(jnp.tile(jnp.array(prefix, jnp.int32), (B, 1)), jax.random.split(jax.random.key(0), B), settings, V)
    end = best_found(jax.lax.while_loop(lambda state: ~state.done, step, start), P)
    return end.finished_tokens, end.finished_scores, end.finished_lengths


def searched(logits, prefix=(START,), **controls):
    """[(tokens, score), ...] of each source; a place that holds no sequence has no tokens."""
    B, V, P = len(logits), logits.shape[-1], len(prefix)
    config = SwitchConfig(vocab_size=V, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    settings, numbers = split_numbers(make_controls(dict(search="t5x", **controls), config))
    tokens, scores, lengths = jax.device_get(search(logits, numbers, settings, prefix))

    def sequence(b, j):
        return tuple(tokens[b, j, : P + lengths[b, j]].tolist()) if lengths[b, j] else (), float(scores[b, j])

    return [[sequence(b, j) for j in range(settings.num_beams)] for b in range(B)]


def next_log_probs(table):
    """The same table as the retelling asks for it."""
    table = table - table.max(-1, keepdims=True)
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return lambda prefixes: np.stack([log_probs[p[-2] if len(p) > 1 else START, p[-1]] for p in prefixes])


def retold(logits, prefix=(START,), **controls):
    return [beam_search(next_log_probs(table), prefix, eos=EOS, **controls) for table in logits]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sequences_and_scores_are_t5xs_with_ties_and_places_without_a_sequence(shape):
    V, num_beams, max_new_tokens, prefix = shape
    logits, controls = tables(V, SHAPES.index(shape)), dict(num_beams=num_beams, max_new_tokens=max_new_tokens)
    for alpha in ALPHAS:
        assert_same(searched(logits, prefix, brevity_penalty=alpha, **controls), retold(logits, prefix, alpha=alpha, **controls))
    assert_same(searched(logits, prefix, **controls), retold(logits, prefix, **controls))  # T5X's alpha


def test_these_tables_hold_what_they_are_for():
    """Ties between different sequences, places without one, live ones returned, searches that end early, penalties that matter."""
    found = {}
    for seed, (V, num_beams, max_new_tokens, prefix) in enumerate(SHAPES):
        logits = tables(V, seed)
        for alpha in ALPHAS:
            rows = retold(logits, prefix, num_beams=num_beams, max_new_tokens=max_new_tokens, alpha=alpha)
            found.update({(seed, b, alpha): (row, len(prefix) + max_new_tokens) for b, row in enumerate(rows)})
    assert len(found) >= 200
    rows = [row for row, _ in found.values()]
    tied = [any(a[1] == b[1] and a[0] != b[0] for a, b in itertools.pairwise(row)) for row in rows]
    assert sum(tied) > 40
    assert sum(any(tokens == () for tokens, _ in row) for row in rows) > 20
    assert sum(row[0][0][-1] != EOS for row in rows) > 20
    assert sum(max(len(tokens) for tokens, _ in row) < longest for row, longest in found.values()) > 20
    assert any(row != found[s, b, 1.0][0] for (s, b, alpha), (row, _) in found.items() if alpha == 0.6)
    assert any([t for t, _ in row] != [t for t, _ in found[s, b, 1.0][0]] for (s, b, a), (row, _) in found.items() if a == 0.0)


def test_batch_mates_do_not_change_a_row():
    """T5X itself goes on with a row until all of its batch may stop, which can reorder ties."""
    V, num_beams, max_new_tokens, prefix = SHAPES[3]
    controls = dict(num_beams=num_beams, max_new_tokens=max_new_tokens, brevity_penalty=0.6)
    logits = tables(V, 3)
    found = searched(logits, prefix, **controls)
    for b in range(0, len(logits), 2):
        alike = np.repeat(logits[b : b + 1], len(logits), axis=0)
        assert searched(alike, prefix, **controls) == [found[b]] * len(logits)


def test_it_finds_other_sequences_than_hugging_faces_search_with_the_same_penalty():
    logits, controls = tables(9, 0), dict(num_beams=3, max_new_tokens=8)
    other = [
        huggingface_beam_search(next_log_probs(table), (START,), eos=(EOS,), divisor=lambda n: ((5 + n) / 6) ** 0.6, **controls)
        for table in logits[: 2 * EACH]
    ]
    found = searched(logits, **controls)[: 2 * EACH]
    assert any([t for t, _ in ours] != [t for t, _ in theirs] for ours, theirs in zip(found, other, strict=True))


def test_a_model_says_what_the_retelling_finds_with_its_uncached_logits():
    params, (ids, mask), prompt = lively_params(BASE), sources(BASE), (11, 30)
    controls, prefix = dict(num_beams=3, max_new_tokens=7), (BASE.decoder_start_token_id, *prompt)
    given = dict(decoder_input_ids=np.tile(prompt, (len(ids), 1)), eos_token_id=20, num_return_sequences=3)
    output = generate(SwitchTransformer(BASE), params, ids, mask, search="t5x", **given, **controls)
    uncached = Uncached(BASE, params, ids, mask, 10, 3)
    for i, sequences in enumerate(output.sequences.reshape(len(ids), 3, -1).tolist()):
        expected = beam_search(uncached.log_probs(i), prefix, eos=20, **controls)
        for found, (tokens, _) in zip(sequences, expected, strict=True):
            tokens = tokens or prefix
            assert tuple(found[: len(tokens)]) == tokens
            assert set(found[len(tokens) :]) <= {BASE.pad_token_id}
        np.testing.assert_allclose(output.scores.reshape(-1, 3)[i], [score for _, score in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("control", [dict(do_sample=True), dict(length_penalty=0.6), dict(early_stopping=True)], ids=str)
def test_controls_that_are_not_t5xs_are_refused_by_name(control):
    name, value = next(iter(control.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} is none of T5X's beam search"):
        make_controls(dict(search="t5x", num_beams=2, **control), SwitchConfig())


def test_t5xs_search_needs_beams_and_a_search_needs_a_known_name():
    with pytest.raises(ConfigError, match="search='t5x' has no effect without num_beams of at least 2"):
        make_controls(dict(search="t5x"), SwitchConfig())
    with pytest.raises(ConfigError, match="search must be one of"):
        make_controls(dict(search="t5", num_beams=2), SwitchConfig())
