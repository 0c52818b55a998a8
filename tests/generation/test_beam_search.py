"""Beams and beam sampling beside a textbook search in plain Python, on random tables of next tokens in place of a model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from textbook import beam_search

from flax_switch.config import SwitchConfig
from flax_switch.config.generation import make_controls, split_numbers
from flax_switch.generation.beam_search import extend_beams, start_beams
from flax_switch.generation.logits import History

V, EOS, START = 9, 1, 0
CONFIG = SwitchConfig(vocab_size=V, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


def tables(count, eos=(EOS,), seed=0, favour=1.0):
    """Logits of the next token by source and the last two tokens, [count, V, V, V]; EOS is favoured."""
    logits = np.random.default_rng(seed).normal(0.0, 1.5, (count, V, V, V)).astype(np.float32)
    logits[..., list(eos)] += favour
    return logits


@functools.partial(jax.jit, static_argnums=(3, 4))
def step(state, logits, numbers, settings, prefix_length):
    """A step of beam search over a table [B, V, V, V]."""
    B, tokens = len(logits), state.tokens
    last, before = tokens[:, :, state.length - 1], jnp.where(state.length > 1, tokens[:, :, state.length - 2], START)
    rows = logits[jnp.arange(B)[:, None], before, last].reshape(-1, V)
    source = jnp.ones((B, 1), jnp.int32)
    history = History(tokens.reshape(len(rows), -1), state.length, prefix_length, source, None)
    return extend_beams(state, rows, history, settings, numbers)


def searched(logits, prefix=(START,), seed=0, **controls):
    """([(tokens, score), ...] of each source, all steps' states) by `extend_beams`."""
    B, P = len(logits), len(prefix)
    settings, numbers = split_numbers(make_controls(controls, CONFIG))
    numbers, logits = jax.tree.map(jnp.asarray, (numbers, logits))
    keys = jax.random.split(jax.random.key(seed), B)
    states = [start_beams(jnp.tile(jnp.asarray(prefix, jnp.int32), (B, 1)), keys, settings, V)]
    while not states[-1].done:
        states.append(step(states[-1], logits, numbers, settings, P))
    end = jax.device_get(states[-1].replace(keys=None))

    def beam(b, j):
        length = P + end.finished_lengths[b, j]
        return tuple(end.finished_tokens[b, j, :length].tolist()), float(end.finished_scores[b, j])

    return [[beam(b, j) for j in range(settings.num_beams)] for b in range(B)], states


def next_log_probs(table, change=lambda x: x):
    """The same table as the textbook asks for it."""

    def log_probs(prefixes):
        logits = np.array([table[p[-2] if len(p) > 1 else START, p[-1]] for p in prefixes], np.float64)
        return change(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    return log_probs


def by_the_book(logits, prefix=(START,), eos=(EOS,), **controls):
    return [beam_search(next_log_probs(table), prefix, eos=eos, **controls) for table in logits]


def assert_same(found, expected):
    for ours, book in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in book]
        np.testing.assert_allclose([score for _, score in ours], [score for _, score in book], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_beams_are_the_textbooks_for_every_length_penalty(early_stopping, num_beams):
    logits = tables(48, seed=num_beams, favour=1.5)
    for length_penalty in (-1.0, -0.3, 0.0, 0.6, 1.0, 2.5):  # those above 0 share a program, as the others do
        controls = dict(num_beams=num_beams, max_new_tokens=7, early_stopping=early_stopping, length_penalty=length_penalty)
        assert_same(searched(logits, **controls)[0], by_the_book(logits, **controls))


def test_several_ends_a_prefix_and_a_brevity_penalty_are_the_textbooks():
    ends, controls = (EOS, 4, 7), dict(num_beams=3, max_new_tokens=6)
    logits = tables(24, ends)
    assert_same(searched(logits, num_beams=3, max_new_tokens=1)[0], by_the_book(logits, num_beams=3, max_new_tokens=1))
    assert_same(searched(logits, eos_token_id=ends, **controls)[0], by_the_book(logits, eos=ends, **controls))
    crowded = tables(24, ends, favour=5.0)  # ends are the best continuations of all beams, and beams go on all the same
    patient = dict(controls, length_penalty=2.5, early_stopping="never")
    assert_same(searched(crowded, eos_token_id=ends, **patient)[0], by_the_book(crowded, eos=ends, **patient))
    prefix = (START, 5, 3)
    assert_same(searched(logits, prefix, **controls)[0], by_the_book(logits, prefix, **controls))
    divisor = lambda length: ((5 + length) / 6) ** 0.8  # noqa: E731
    found = searched(logits, brevity_penalty=0.8, early_stopping="never", **controls)[0]
    assert_same(found, by_the_book(logits, divisor=divisor, early_stopping="never", **controls))


def test_when_to_stop_makes_a_difference_to_these_tables():
    logits = tables(24, seed=11)
    found = [
        by_the_book(logits, num_beams=3, max_new_tokens=8, length_penalty=2.5, early_stopping=how) for how in (False, True, "never")
    ]
    for some, others in itertools.combinations(found, 2):
        assert any(a != b for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("prefix", [(START,), (START, 5, 3)])
def test_ancestors_say_where_each_beam_s_past_was_computed(prefix):
    """A row that follows its ancestors through the tokens that rows were given, place by place, finds its own tokens."""
    _, states = searched(tables(6), prefix, num_beams=3, max_new_tokens=7, early_stopping="never")
    given = np.full(states[0].tokens.shape, -1)
    given[:, 0, : len(prefix)] = prefix  # a prefix is computed once, at beam 0
    moved = False
    for state in states:
        length = int(state.length)
        if length > len(prefix) or len(prefix) == 1:
            given[:, :, length - 1] = state.tokens[:, :, length - 1]
        found = np.take_along_axis(given, np.asarray(state.ancestors), axis=1)[:, :, :length]
        possible = np.asarray(state.scores) > -1e8
        np.testing.assert_array_equal(found[possible], np.asarray(state.tokens)[:, :, :length][possible])
        moved |= bool((np.asarray(state.ancestors)[:, :, :length] != np.arange(3)[:, None])[possible].any())
    assert moved, "no beam was ever exchanged"


# --- beam sampling


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_sampling_is_the_textbook_with_the_same_random_numbers(early_stopping):
    prefix, temperature, k = (START, 5), 1.7, 6
    logits = tables(24, seed=5)
    controls = dict(num_beams=3, max_new_tokens=6, early_stopping=early_stopping, length_penalty=1.5)
    found = searched(logits, prefix, do_sample=True, temperature=temperature, top_k=k, **controls)[0]
    keys = jax.random.split(jax.random.key(0), len(logits))

    def filtered(log_probs):
        scores = log_probs / temperature
        return np.where(scores < np.sort(scores)[:, -k:][:, :1], -np.inf, scores)

    def noise(key):
        key_of = lambda step: jax.random.fold_in(key, len(prefix) + step - 1)  # noqa: E731
        return lambda step: np.asarray(jax.random.gumbel(key_of(step), (3 * V,)), np.float64).reshape(3, V)

    expected = [
        beam_search(next_log_probs(table, filtered), prefix, eos=(EOS,), noise=noise(key), **controls)
        for table, key in zip(logits, keys, strict=True)
    ]
    assert_same(found, expected)
    assert found != searched(logits, prefix, seed=1, do_sample=True, temperature=temperature, top_k=k, **controls)[0]


def test_beam_sampling_draws_continuations_without_replacement_from_the_softmax_of_their_scores():
    """Two steps of two beams: how often each pair of sequences is found, against its probability over all possible draws."""
    draws, beams, words = 4096, 2, 5
    table = np.random.default_rng(3).normal(0.0, 1.0, (V, V, V)).astype(np.float32)
    table[..., words:] = -np.inf
    found = searched(np.tile(table, (draws, 1, 1, 1)), do_sample=True, top_k=0, num_beams=beams, max_new_tokens=2)[0]
    counts = {}
    for sequences in found:
        best = tuple(tokens for tokens, _ in sequences)
        counts[best] = counts.get(best, 0) + 1
    probabilities = possible_draws(next_log_probs(table), beams, words)
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert counts.keys() <= probabilities.keys()
    common = [outcome for outcome, p in probabilities.items() if p * draws > 5]
    rest = draws - sum(counts.get(outcome, 0) for outcome in common)
    observed = [*(counts.get(outcome, 0) for outcome in common), rest]
    expected = [*(probabilities[outcome] * draws for outcome in common)]
    expected.append(draws - sum(expected))
    assert len(common) > 20
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def possible_draws(log_probs, beams, words):
    """{sequences found: probability} of beam sampling for two steps, by going through every order of draws."""
    probabilities = {}

    def forced(order):
        noise = np.full((beams, V), -1e9)
        for rank, (beam, token) in enumerate(order):
            noise[beam, token] = 1e6 - 1e3 * rank
        return noise

    def orders(totals, count):
        """(order, probability) of drawing `count` of some continuations one after the other, without putting back."""
        weights = {place: np.exp(total) for place, total in totals.items()}
        everything = sum(weights.values())
        for order in itertools.permutations(weights, count):
            left, p = everything, 1.0
            for place in order:
                p, left = p * weights[place] / left, left - weights[place]
            yield order, p

    first = log_probs([(START,)])[0]
    for order, p in orders({(0, token): first[token] for token in range(words)}, 2 * beams):
        # As the search goes on: the best of those that did not end.
        running = sorted(((first[t], t) for _, t in order if t != EOS), reverse=True)[:beams]
        second = log_probs([(START, t) for _, t in running])
        totals = {(b, t): running[b][0] + second[b, t] for b in range(len(running)) for t in range(words)}
        for last, q in orders(totals, beams):
            noise = (forced(order), forced(last))
            controls = dict(num_beams=beams, max_new_tokens=2, eos=(EOS,))
            found = beam_search(log_probs, (START,), noise=lambda step, noise=noise: noise[step - 1], **controls)
            best = tuple(tokens for tokens, _ in found)
            probabilities[best] = probabilities.get(best, 0.0) + p * q
    return probabilities
