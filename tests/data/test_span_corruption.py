"""Span corruption: inversion, lengths and T5's distribution of masks."""

import itertools
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flax_switch.config import ConfigError
from flax_switch.data.random_bits import example_keys
from flax_switch.data.span_corruption import (
    corrupted_lengths,
    derived_raw_length,
    noise_counts,
    random_spans_noise_mask,
    restore,
    span_corrupt,
)

TOP = 999  # <extra_id_0>; text ids lie below 900


def keys(count: int, seed: int = 0) -> np.ndarray:
    return example_keys(seed, np.zeros(count, np.int64), np.arange(count))


def row(values: np.ndarray, lengths: np.ndarray, m: int) -> np.ndarray:
    return values[m, : lengths[m]]


texts = st.lists(st.integers(0, 150), min_size=1, max_size=6)
densities = st.floats(0.05, 0.9)
mean_lengths = st.floats(1.0, 8.0)


@hypothesis.given(texts, st.integers(0, 2**63), densities, mean_lengths)
def test_the_original_tokens_are_restored_exactly(lengths, seed, density, mean_length):
    lengths = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(3, 900, (len(lengths), max(lengths.max(), 1)))
    settings = dict(noise_density=density, mean_noise_span_length=mean_length)
    made = span_corrupt(tokens, lengths, keys(len(lengths), seed), top_sentinel=TOP, **settings)
    for m in range(len(lengths)):
        inputs, targets = row(made.inputs, made.input_lengths, m), row(made.targets, made.target_lengths, m)
        assert inputs[-1] == targets[-1] == 1
        restored = restore(inputs, targets, top_sentinel=TOP)
        np.testing.assert_array_equal(restored, restore(inputs.tolist(), targets.tolist(), top_sentinel=TOP))
        np.testing.assert_array_equal(restored, tokens[m, : lengths[m]])
        assert not made.inputs[m, made.input_lengths[m] :].any() and not made.targets[m, made.target_lengths[m] :].any()


@hypothesis.given(texts, st.integers(0, 2**63), densities, mean_lengths)
def test_shifted_masks_are_t5s_with_a_part_of_the_first_text_at_the_end(lengths, seed, density, mean_length):
    lengths = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(3, 900, (len(lengths), max(lengths.max(), 1)))
    settings = dict(noise_density=density, mean_noise_span_length=mean_length)
    masks, shifted = (random_spans_noise_mask(lengths, keys(len(lengths), seed), **settings, shifted=s) for s in (False, True))
    made = span_corrupt(tokens, lengths, keys(len(lengths), seed), top_sentinel=TOP, **settings, shifted=True)
    for m, length in enumerate(lengths):
        mask, moved = masks[m, :length], shifted[m, :length]
        first = int(mask.argmax()) if mask.any() else 0
        by = first - int(moved.argmax()) if mask.any() else 0
        assert 0 <= by <= first
        np.testing.assert_array_equal(moved, np.roll(mask, -by))
        assert not shifted[m, length:].any()
        inputs, targets = row(made.inputs, made.input_lengths, m), row(made.targets, made.target_lengths, m)
        np.testing.assert_array_equal(restore(inputs, targets, top_sentinel=TOP), tokens[m, :length])
        assert [i for i in targets[:-1] if i < 900] == tokens[m, :length][moved].tolist()


def test_every_shift_from_none_to_all_of_the_first_text_is_as_likely():
    lengths = np.full(30_000, 12)
    masks, shifted = (random_spans_noise_mask(lengths, keys(30_000), noise_density=0.5, shifted=s) for s in (False, True))
    first, by = masks.argmax(1), masks.argmax(1) - shifted.argmax(1)
    for tokens in range(1, 6):
        counts = np.bincount(by[first == tokens], minlength=tokens + 1)
        expected = counts.sum() / (tokens + 1)
        assert len(counts) == tokens + 1 and abs(counts - expected).max() < 5 * expected**0.5, (tokens, counts)


@hypothesis.given(texts, st.integers(0, 2**63), densities, mean_lengths)
def test_masks_have_the_promised_noise_and_spans_and_begin_with_text(lengths, seed, density, mean_length):
    lengths = np.array(lengths)
    settings = dict(noise_density=density, mean_noise_span_length=mean_length)
    masks = random_spans_noise_mask(lengths, keys(len(lengths), seed), **settings)
    noise, spans = noise_counts(lengths, density, mean_length)
    for m, length in enumerate(lengths):
        mask = masks[m, :length]
        assert mask.sum() == noise[m] and not masks[m, length:].any()
        assert (np.diff(mask.astype(int), prepend=0) == 1).sum() == spans[m]
        if length >= 2:
            assert not mask[0] and mask[-1]


@hypothesis.given(st.integers(3, 300), st.one_of(st.none(), st.integers(3, 300)), densities, mean_lengths)
def test_chunks_of_the_derived_length_fit_and_one_more_token_would_not(inputs_length, targets_length, density, mean_length):
    settings = dict(noise_density=density, mean_noise_span_length=mean_length)
    raw, needed = derived_raw_length(inputs_length, targets_length, **settings)
    inputs, targets = corrupted_lengths(np.arange(raw + 2), **settings)
    limit = targets_length or 10**9
    assert inputs[: raw + 1].max() <= inputs_length and targets[: raw + 1].max() <= limit
    assert targets[raw] == needed
    assert inputs[raw + 1] > inputs_length or targets[raw + 1] > limit


def test_t5_s_recipe_takes_568_tokens_for_inputs_of_512_and_targets_of_114():
    assert derived_raw_length(512, 114, num_sentinels=100) == (568, 114)
    noise, spans = noise_counts(np.array([568]))
    assert (noise[0], spans[0]) == (85, 28)


def t5_counts(length, density, mean_length):
    """T5's random_spans_noise_mask, in float32 and with halves rounded to even, as TensorFlow computes it."""
    noise = int(np.round(np.float32(length) * np.float32(density)))
    noise = min(max(noise, 1), length - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean_length))), 1)
    return noise, spans


@pytest.mark.parametrize(("density", "mean_length"), [(0.15, 3.0), (0.5, 3.0), (0.15, 2.0), (0.3, 5.0), (0.5, 8.0)])
def test_noise_tokens_and_spans_are_rounded_as_t5_does_for_every_length(density, mean_length):
    lengths = np.arange(2, 1500)
    noise, spans = noise_counts(lengths, density, mean_length)
    want = np.array([t5_counts(int(length), density, mean_length) for length in lengths])
    np.testing.assert_array_equal(noise, want[:, 0])
    np.testing.assert_array_equal(spans, want[:, 1])
    inputs, targets = corrupted_lengths(lengths, density, mean_length)
    np.testing.assert_array_equal(inputs, lengths - noise + spans + 1)  # a sentinel for every span, and EOS
    np.testing.assert_array_equal(targets, noise + spans + 1)


def test_halves_are_rounded_to_the_even_number():
    # 10 and 30 tokens have 1.5 and 4.5 of noise; 2.5 spans come of 5 tokens in spans of 2.
    assert [int(n) for n in noise_counts(np.array([10, 30, 50]), 0.15, 3.0)[0]] == [2, 4, 8]
    assert [int(noise_counts(np.array(n), 0.5, 2.0)[1]) for n in (10, 14)] == [2, 4]


def test_every_span_has_a_token_of_each_kind_where_noise_is_most_of_the_text():
    noise, spans = noise_counts(np.arange(2, 40), 0.9, 1.0)  # T5 would ask for as many spans as noise tokens, and fail
    assert (spans <= np.arange(2, 40) - noise).all() and (spans >= 1).all()
    assert (noise_counts(np.array([0, 1]))[0] == 0).all() and (noise_counts(np.array([0, 1]))[1] == 0).all()


def test_every_cut_into_segments_is_equally_likely():
    # Of 10 tokens 4 are noise, in 2 spans: 3 ways to cut the noise times 5 to cut the rest.
    count = 30_000
    masks = random_spans_noise_mask(np.full(count, 10), keys(count), noise_density=0.4, mean_noise_span_length=2.0)
    found = Counter(map(tuple, masks.tolist()))
    expected = set()
    for kept, noise in itertools.product(range(1, 6), range(1, 4)):
        expected.add(tuple(np.repeat([False, True, False, True], [kept, noise, 6 - kept, 4 - noise]).tolist()))
    assert set(found) == expected
    chi_squared = sum((n - count / 15) ** 2 / (count / 15) for n in found.values())
    assert chi_squared < 36.1  # the 99.9 % point for 14 degrees of freedom


def test_sentinels_descend_from_the_top_and_stand_in_the_same_order_on_both_sides():
    tokens = np.arange(3, 103)[None]
    made = span_corrupt(tokens, np.array([100]), keys(1), top_sentinel=TOP)
    spans = int(noise_counts(np.array([100]))[1][0])
    for side in (made.inputs[0], made.targets[0]):
        np.testing.assert_array_equal(side[side > 900], TOP - np.arange(spans))
    assert made.targets[0, 0] == TOP and made.inputs[0, made.input_lengths[0] - 2] == TOP - spans + 1


def test_an_example_does_not_depend_on_its_batch_mates():
    tokens, lengths = np.arange(3, 203).reshape(4, 50), np.array([50, 17, 33, 2])
    together = span_corrupt(tokens, lengths, keys(4), top_sentinel=TOP)
    for m in range(4):
        alone = span_corrupt(tokens[m : m + 1, : lengths[m]], lengths[m : m + 1], keys(4)[m : m + 1], top_sentinel=TOP)
        np.testing.assert_array_equal(row(alone.inputs, alone.input_lengths, 0), row(together.inputs, together.input_lengths, m))
        np.testing.assert_array_equal(
            row(alone.targets, alone.target_lengths, 0), row(together.targets, together.target_lengths, m)
        )


def test_restoring_a_pair_that_does_not_belong_together_is_an_error():
    made = span_corrupt(np.arange(3, 103)[None], np.array([100]), keys(1), top_sentinel=TOP)
    with pytest.raises(ConfigError, match="do not belong together"):
        restore(made.inputs[0], np.array([TOP - 7, 5, 1]), top_sentinel=TOP)


def test_too_few_sentinels_or_too_short_lengths_are_errors_that_say_what_to_change():
    with pytest.raises(ConfigError, match="Masking 568 tokens needs 28 sentinels, but the vocabulary has 10"):
        derived_raw_length(512, 114, num_sentinels=10)
    with pytest.raises(ConfigError, match="at least 3"):
        derived_raw_length(2, 10)
