"""Dropout's masks look random: the right share, no structure between elements, rows or keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_switch.ops.dropout import dropout, keep_mask, random_uniform, random_words, relu_dropout

KEYS = [jax.random.key(i) for i in range(4)]


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_share_kept_is_that_of_independent_draws(rate):
    for key in KEYS:
        mask = np.asarray(keep_mask(key, rate, (512, 768)))
        assert stats.binomtest(int(mask.sum()), mask.size, 1 - rate).pvalue > 1e-3
        for sums, size in ((mask.sum(0), 512), (mask.sum(1), 768)):  # neither rows nor columns vary more or less than they should
            chi2 = ((sums - size * (1 - rate)) ** 2 / (size * rate * (1 - rate))).sum()
            assert 1e-4 < stats.chi2.sf(chi2, len(sums)) < 1 - 1e-4


def test_a_rate_just_below_one_drops_all_but_what_2_to_the_minus_32_may_keep():
    assert not np.asarray(keep_mask(KEYS[0], 1 - 1e-12, (512, 512))).any()
    assert np.asarray(keep_mask(KEYS[0], 1e-12, (512, 512))).all()


def test_words_are_uniform_in_their_high_and_low_bits():
    words = np.asarray(random_words(KEYS[0], (256, 4096)))
    for shift in (0, 12, 24):
        counts = np.bincount(((words >> shift) & 255).ravel(), minlength=256)
        assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4


def test_neighbours_rows_and_keys_do_not_correlate():
    words = np.asarray(random_words(KEYS[0], (256, 4096))).astype(np.float64)
    other = np.asarray(random_words(KEYS[1], (256, 4096))).astype(np.float64)
    pairs = [(words[:, :-d], words[:, d:]) for d in (1, 2, 3, 64)] + [(words[:-d], words[d:]) for d in (1, 2, 16)]
    for a, b in [*pairs, (words, other)]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size) < 4  # standard deviations


def test_no_word_comes_more_often_than_chance_has_it():
    words = np.asarray(random_words(KEYS[2], (1024, 1024))).ravel()
    repeated = words.size - len(np.unique(words))
    expected = words.size**2 / 2**33
    assert abs(repeated - expected) < 5 * np.sqrt(expected)


def test_a_row_does_not_depend_on_how_many_follow():
    np.testing.assert_array_equal(random_words(KEYS[0], (2, 3, 8))[:1], random_words(KEYS[0], (1, 3, 8)))


def test_shared_axes_share_their_draw_and_gradients_pass_where_values_do():
    x = jnp.ones((2, 16, 64))
    y, pull = jax.vjp(lambda x: dropout(x, 0.5, KEYS[0], broadcast_axes=(-2,)), x)
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))
    assert set(np.unique(y)) == {0.0, 2.0}
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], y)


@pytest.mark.parametrize("rng", [None, KEYS[1]], ids=["off", "on"])
def test_a_relu_with_its_dropout_has_values_and_gradients_of_both(rng):
    x, gradient = jax.random.normal(KEYS[2], (2, 2, 16, 64)).at[:, :, 3].set(0.0)
    apart, pull_apart = jax.vjp(lambda x: dropout(jax.nn.relu(x), 0.3, rng, broadcast_axes=(0,)), x)
    together, pull = jax.vjp(lambda x: relu_dropout(x, 0.3, rng, broadcast_axes=(0,)), x)
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(pull(gradient)[0], pull_apart(gradient)[0])


def test_uniform_numbers_are_uniform_and_keep_their_bounds():
    numbers = np.asarray(random_uniform(KEYS[3], (256, 4096), 0.9, 1.1), np.float64)
    assert 0.9 - 1e-7 <= numbers.min() < 0.9001 and 1.0999 < numbers.max() < 1.1
    assert stats.kstest(numbers.ravel()[::16], stats.uniform(0.9, 0.2).cdf).pvalue > 1e-3


def test_the_extreme_rates_keep_everything_and_nothing():
    x = jnp.ones((64, 64))
    assert dropout(x, 0.0, KEYS[0]) is x
    assert dropout(x, 0.3, None) is x
    for rate in (0.999999999, 1 - 2**-40):
        assert not dropout(x, rate, KEYS[0]).any()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_any_kind_of_key_will_do(impl):
    mask = keep_mask(jax.random.key(0, impl=impl), 0.5, (1000,))
    assert 400 < mask.sum() < 600
