"""UL2's denoisers: each as often, with the noise of the paper's table, and inputs that say which kind they are."""

import numpy as np
import pytest

from flax_switch.config import ConfigError, DataConfig
from flax_switch.data import prepare
from flax_switch.data.objectives import ConcatenatedText, Mixture, SeparateDocuments
from flax_switch.data.random_bits import example_keys
from flax_switch.data.span_corruption import noise_counts, restore
from flax_switch.data.ul2 import DENOISERS, R, S, X, denoisers, noise

PAPER = {(R, 0.15, 3), (R, 0.15, 8), (X, 0.5, 3), (X, 0.5, 8), (X, 0.15, 64), (X, 0.5, 64)}  # and S: a quarter, the end


def keys(count: int) -> np.ndarray:
    return example_keys(0, np.zeros(count, np.int64), np.arange(count))


@pytest.fixture(scope="module")
def ul2(config, vocabulary):
    settings = config.replace(span_corruption_rate=0.0, ul2_rate=1.0, inputs_length=64, targets_length=48, mode_tokens=True)
    return prepare(settings, vocabulary=vocabulary, quiet=True)


def test_the_table_is_the_papers_and_every_row_is_drawn_as_often():
    assert {row for row in DENOISERS if row[0] != S} == PAPER and [row[:2] for row in DENOISERS if row[0] == S] == [(S, 0.25)]
    np.testing.assert_allclose(np.bincount(denoisers(keys(70_000))), 10_000, atol=400)
    density, _ = noise(keys(70_000))
    drawn = density[[DENOISERS[i][0] == S for i in denoisers(keys(70_000))]]
    np.testing.assert_allclose([drawn.min(), drawn.mean(), drawn.max()], [0.15, 0.25, 0.35], atol=0.002)


def test_every_example_masks_what_its_denoiser_says_and_begins_with_its_mode(ul2):
    mixture, length = ul2.mixture, ul2.mixture.raw_length
    rows = keys(300)
    tokens = np.random.default_rng(0).integers(3, ul2.vocabulary.num_pieces, (300, length))
    made = mixture(tokens, np.full(300, length), rows)
    sentinels = dict(top_sentinel=mixture.top_sentinel, num_sentinels=ul2.vocabulary.num_sentinels)
    last = ul2.vocabulary.sentinel_id(ul2.vocabulary.num_sentinels - 1)
    assert made.input_lengths.max() <= 64 and made.target_lengths.max() <= 48
    for m, row in enumerate(denoisers(rows)):
        mode, density, span = DENOISERS[row]
        inputs, targets = made.inputs[m, : made.input_lengths[m]], made.targets[m, : made.target_lengths[m]]
        assert inputs[0] == last + mode
        np.testing.assert_array_equal(restore(inputs[1:], targets, **sentinels), tokens[m])
        hidden = [i for i in targets[:-1] if i < ul2.vocabulary.num_pieces]
        spans = len(targets) - 1 - len(hidden)
        if mode == S:
            assert spans == 1 and hidden == tokens[m, length - len(hidden) :].tolist()
            assert round(0.15 * length) <= len(hidden) <= round(0.35 * length)
        else:
            assert (len(hidden), spans) == tuple(int(n) for n in noise_counts(np.asarray(length), density, span))


def test_an_example_is_the_same_whatever_others_are_made_with_it(ul2):
    tokens = np.random.default_rng(1).integers(3, ul2.vocabulary.num_pieces, (50, 40))
    lengths = np.random.default_rng(2).integers(2, 40, 50)
    together = ul2.mixture(tokens, lengths, keys(50))
    for m in range(50):
        alone = ul2.mixture(tokens[m : m + 1], lengths[m : m + 1], keys(50)[m : m + 1])
        n = alone.input_lengths[0]
        assert n == together.input_lengths[m]
        np.testing.assert_array_equal(alone.inputs[0, :n], together.inputs[m, :n])


def test_the_longest_text_fits_and_a_longer_one_would_not(ul2):
    text = ConcatenatedText(ul2.train, ul2.mixture, seed=0)
    made = text.examples(np.arange(text.num_examples), np.zeros(text.num_examples, np.int64))
    assert made.input_lengths.max() <= 64 and made.target_lengths.max() <= 48
    for room in ("inputs_length", "targets_length"):
        wider = Mixture.of(ul2.config.replace(**{room: 400}), ul2.vocabulary)
        assert wider.raw_length >= ul2.mixture.raw_length
    assert Mixture.of(ul2.config.replace(inputs_length=65, targets_length=49), ul2.vocabulary).raw_length > ul2.mixture.raw_length
    source = SeparateDocuments(ul2.train, ul2.mixture, seed=0)
    packed = source.examples(np.arange(source.num_examples), np.zeros(source.num_examples, int))
    assert (packed.input_lengths <= source.input_lengths).all() and (packed.target_lengths <= source.target_lengths).all()


def test_lengths_that_hold_no_text_are_refused(vocabulary):
    with pytest.raises(ConfigError, match="UL2's denoisers need data.inputs_length"):
        Mixture.of(DataConfig(span_corruption_rate=0.0, ul2_rate=1.0, inputs_length=3, targets_length=2), vocabulary)
