"""Figures of made-up routings whose answers are known."""

import numpy as np
import pytest

from flax_switch.inspection import specialisation as figures

M, E = 8000, 8
RANDOM = np.random.default_rng(0)


def test_saturation_counts_choices_that_stay_whatever_their_order():
    final = np.asarray([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert figures.saturation(final, final) == 1.0
    assert figures.saturation(final[:, ::-1], final) == 1.0
    earlier = np.asarray([[1, 0], [2, 0], [0, 1], [7, 1]])  # two, one, none, one of two choices stay
    assert figures.saturation(earlier, final) == 0.5


def test_co_activation_is_the_share_of_an_experts_tokens_that_another_takes_too():
    chosen = np.asarray([[0, 1], [1, 0], [0, 2], [0, 3]])
    np.testing.assert_allclose(figures.co_activation(chosen, 4), [[0, 0.5, 0.25, 0.25], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    assert not figures.co_activation(chosen[:, :1], 4).any()


def test_an_expert_that_the_token_decides_is_known_from_the_token():
    token = RANDOM.integers(0, 64, M)
    assert figures.specialisation(token % E, token) == pytest.approx(3.0, abs=0.05)  # log2 of eight even experts
    assert figures.specialisation(token % 2, token) == pytest.approx(1.0, abs=0.05)
    half = np.where(RANDOM.random(M) < 0.5, token % E, RANDOM.integers(0, E, M))
    # An expert is right with 9/16 and each of seven others has 1/16.
    entropy = -(9 / 16 * np.log2(9 / 16) + 7 / 16 * np.log2(1 / 16))
    assert figures.specialisation(half, token) == pytest.approx(3.0 - entropy, abs=0.06)


def test_chance_is_no_specialisation_although_the_plain_counts_say_so():
    token, expert = RANDOM.integers(0, 250, M), RANDOM.integers(0, E, M)
    assert figures.information(expert, token) > 0.1
    assert figures.specialisation(expert, token) < 0.01


def test_information_of_small_tables_by_hand():
    a = np.asarray([0, 0, 1, 1])
    assert figures.information(a, a) == pytest.approx(1.0)
    assert figures.information(a, np.asarray([0, 1, 0, 1])) == pytest.approx(0.0)
    assert figures.information(a, np.zeros(4, int)) == pytest.approx(0.0)


def test_a_following_expert_is_guessed_where_it_follows_and_not_where_it_does_not():
    first = RANDOM.integers(0, E, M)
    guessed, without = figures.predictability(first, (first * 3) % E)
    assert guessed == 1.0 and without < 0.2
    guessed, without = figures.predictability(first, RANDOM.integers(0, E, M))
    assert guessed == pytest.approx(1 / E, abs=0.03) and without == pytest.approx(1 / E, abs=0.03)
    crowded = np.where(RANDOM.random(M) < 0.9, 0, 1)
    guessed, without = figures.predictability(first, crowded)
    assert guessed == pytest.approx(0.9, abs=0.02) and without == pytest.approx(0.9, abs=0.02)


def test_conditional_distributions_sum_to_one_where_there_is_something():
    table = figures.conditional(np.asarray([0, 0, 2]), np.asarray([1, 0, 1]), (3, 2))
    np.testing.assert_allclose(table, [[0.5, 0.5], [0, 0], [0, 1]])
