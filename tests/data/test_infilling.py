"""Text infilling: the inputs of span corruption, the whole text as targets; and the batches that probe an encoder."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flax_switch.config import ConfigError, DataConfig
from flax_switch.data import prepare
from flax_switch.data.batches import IGNORED
from flax_switch.data.infilling import infill
from flax_switch.data.objectives import OBJECTIVES, ConcatenatedText, Mixture, SeparateDocuments
from flax_switch.data.random_bits import example_keys
from flax_switch.data.span_corruption import noise_counts, span_corrupt
from flax_switch.data.vocabulary import Vocabulary

TOP = 999


def keys(count: int) -> np.ndarray:
    return example_keys(0, np.zeros(count, np.int64), np.arange(count))


@hypothesis.given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6), st.sampled_from([0.15, 0.3, 0.5]), st.sampled_from([1.0, 3.0])
)
def test_shown_text_and_hidden_text_in_turns_are_the_targets(lengths, density, span_length):
    lengths = np.array(lengths)
    tokens = np.arange(len(lengths) * 60).reshape(-1, 60) + 3
    settings = dict(top_sentinel=TOP, noise_density=density, mean_noise_span_length=span_length)
    made = infill(tokens, lengths, keys(len(lengths)), **settings)
    corrupted = span_corrupt(tokens, lengths, keys(len(lengths)), shifted=True, **settings)
    np.testing.assert_array_equal(made.inputs, corrupted.inputs)
    for m, length in enumerate(lengths):
        inputs, targets = made.inputs[m, : made.input_lengths[m]], made.targets[m, : made.target_lengths[m]]
        hidden = made.hidden[m, : made.target_lengths[m]]
        assert targets.tolist() == [*tokens[m, :length], 1]
        shown = [i for i in inputs if i < TOP - 100]
        assert shown == targets[~hidden].tolist()  # EOS, too, stands in both
        noise = [i for i in corrupted.targets[m, : corrupted.target_lengths[m] - 1] if i < TOP - 100]
        assert noise == targets[hidden].tolist()
        assert not made.hidden[m, length:].any()


@hypothesis.given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**63), st.floats(0.05, 0.7))
def test_masks_of_whole_words_are_all_words_that_a_span_touches(lengths, seed, density):
    lengths, random = np.array(lengths), np.random.default_rng(seed)
    word_starts = np.arange(100) % 3 == 0
    tokens = random.integers(3, 100, (len(lengths), 40))
    row_keys = example_keys(seed, np.zeros(len(lengths), np.int64), np.arange(len(lengths)))
    settings = dict(top_sentinel=TOP, noise_density=density)
    narrow, wide = (infill(tokens, lengths, row_keys, **settings, word_starts=words) for words in (None, word_starts))
    np.testing.assert_array_equal(wide.targets, narrow.targets)
    for m, length in enumerate(lengths):
        words = [[0]]
        for i in range(1, length):
            words = [*words, [i]] if word_starts[tokens[m, i]] else [*words[:-1], [*words[-1], i]]
        touched = [i for word in words if narrow.hidden[m, word].any() for i in word]
        expected = touched if len(touched) < length else np.flatnonzero(narrow.hidden[m]).tolist()
        assert np.flatnonzero(wide.hidden[m]).tolist() == expected
        inputs, n = [], 0
        for i in range(length):
            if not wide.hidden[m, i]:
                inputs.append(tokens[m, i])
            elif i == 0 or not wide.hidden[m, i - 1]:
                inputs, n = [*inputs, TOP - n], n + 1
        assert wide.inputs[m, : wide.input_lengths[m]].tolist() == [*inputs, 1]
        assert wide.input_lengths[m] <= narrow.input_lengths[m]


def test_spans_are_widened_in_the_share_of_the_texts_that_is_asked_for():
    lengths, word_starts = np.full(4000, 30), np.arange(100) % 3 == 0
    tokens = np.random.default_rng(0).integers(3, 100, (4000, 30))
    settings = dict(top_sentinel=TOP, word_starts=word_starts)
    none, some, all_ = (infill(tokens, lengths, keys(4000), **settings, words=words).hidden for words in (0.0, 0.3, 1.0))
    differs = (none != all_).any(axis=1)
    widened = (some == all_).all(axis=1)
    assert ((some == none).all(axis=1) | widened).all()
    assert abs(widened[differs].mean() - 0.3) < 0.03 and differs.mean() > 0.5


def test_pieces_after_a_space_and_marks_begin_words(vocabulary):
    ids = vocabulary.encode("ba be, bi.")
    pieces = [vocabulary._pieces.IdToPiece(int(i)) for i in ids]
    assert [bool(vocabulary.word_starts[i]) for i in ids] == [piece[0] in "▁,.<" for piece in pieces]
    assert len(vocabulary.word_starts) == vocabulary.num_pieces and 0 < vocabulary.word_starts.mean() < 1


@pytest.fixture(scope="module")
def mixed(config, vocabulary):
    settings = config.replace(span_corruption_rate=1.0, prefix_lm_rate=1.0, infilling_rate=2.0, targets_length=30)
    return prepare(settings, vocabulary=vocabulary, quiet=True)


def test_three_objectives_are_drawn_at_their_rates_and_none_of_rate_zero_is_drawn(mixed):
    ids, epochs = np.divmod(np.arange(6000), 40)[::-1]
    made = ConcatenatedText(mixed.train, mixed.mixture, seed=0).examples(ids, epochs)
    shares = np.bincount(made.objective, minlength=3) / 6000
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.025)
    for name, rates in {n: [float(n == o) for o in OBJECTIVES] for n in OBJECTIVES}.items():
        alone = mixed.mixture.replace(**dict(zip([f"{o}_rate" for o in OBJECTIVES], rates, strict=True)))
        assert set(alone._objectives(keys(1000))) == {list(OBJECTIVES).index(name)}


def test_every_objective_of_a_mixture_fits_its_lengths_and_fills_them(mixed):
    ids = np.arange(mixed.train.num_tokens // mixed.mixture.raw_length - 2)
    made = ConcatenatedText(mixed.train, mixed.mixture, seed=0).examples(ids, np.zeros_like(ids))
    assert made.input_lengths.max() <= 32 and made.target_lengths.max() == 30


def test_packed_infilling_has_the_room_that_it_needs(mixed):
    mixture = mixed.mixture.replace(prefix_lm_rate=0.0, span_corruption_rate=0.0)
    source = SeparateDocuments(mixed.train, mixture, seed=0)
    made = source.examples(np.arange(source.num_examples), np.zeros(source.num_examples, int))
    np.testing.assert_array_equal(made.input_lengths, source.input_lengths)
    np.testing.assert_array_equal(made.target_lengths, source.target_lengths)


def test_with_mode_tokens_inputs_say_which_objective_is_wanted_and_all_else_is_the_same(mixed):
    ids, epochs = np.arange(200), np.zeros(200, np.int64)
    plain = ConcatenatedText(mixed.train, mixed.mixture, seed=0)
    modes = Mixture.of(mixed.config.replace(mode_tokens=True, inputs_length=mixed.config.inputs_length + 1), mixed.vocabulary)
    assert modes.raw_length == mixed.mixture.raw_length
    made, marked = plain.examples(ids, epochs), ConcatenatedText(mixed.train, modes, seed=0).examples(ids, epochs)
    np.testing.assert_array_equal(marked.targets, made.targets)
    np.testing.assert_array_equal(marked.objective, made.objective)
    sentinels = mixed.vocabulary.num_sentinels
    first = [mixed.vocabulary.sentinel_id(sentinels - 1), mixed.vocabulary.sentinel_id(sentinels - 2), None]
    for m, objective in enumerate(made.objective):
        inputs, was = marked.inputs[m, : marked.input_lengths[m]], made.inputs[m, : made.input_lengths[m]]
        assert inputs.tolist() == [*[first[objective]][: first[objective] is not None], *was]
    assert modes.identity() != mixed.mixture.identity() and "mode_tokens" not in mixed.mixture.identity()


@pytest.mark.parametrize("rates", [(1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0)], ids=["two", "three", "prefix"])
def test_packed_examples_with_mode_tokens_fit_the_room_that_is_reckoned_for_them(mixed, rates):
    settings = dict(zip(["span_corruption_rate", "prefix_lm_rate", "infilling_rate"], rates, strict=True))
    mixture = Mixture.of(mixed.config.replace(mode_tokens=True, **settings), mixed.vocabulary)
    source = SeparateDocuments(mixed.train, mixture, seed=0)
    made = source.examples(np.arange(source.num_examples), np.zeros(source.num_examples, int))
    assert (made.input_lengths <= source.input_lengths).all() and source.input_lengths.max() <= mixed.config.inputs_length
    assert (made.target_lengths <= source.target_lengths).all()


def test_mode_tokens_take_their_sentinels_from_those_of_the_spans(mixed):
    few = Vocabulary(mixed.vocabulary.model, 1)
    with pytest.raises(ConfigError, match="needs 3 sentinels.*has 1.*num_sentinels"):
        Mixture.of(mixed.config.replace(mode_tokens=True), few)
    spans = int(noise_counts(np.asarray(mixed.mixture.raw_length))[1])
    Mixture.of(mixed.config, Vocabulary(mixed.vocabulary.model, max(spans, 3)))
    with pytest.raises(ConfigError, match="sentinels"):
        Mixture.of(mixed.config.replace(mode_tokens=True), Vocabulary(mixed.vocabulary.model, spans + 2))


def test_a_stream_without_infilling_is_the_one_it_was(prepared, mixed):
    assert "infilling_rate" not in prepared.mixture.identity() and "infilling_rate" in mixed.mixture.identity()


def test_rates_that_leave_no_objective_are_refused():
    with pytest.raises(ConfigError, match="infilling_rate"):
        DataConfig(span_corruption_rate=0.0)
    DataConfig(span_corruption_rate=0.0, infilling_rate=1.0)


def test_probes_are_the_held_out_batches_and_the_same_targets_with_the_inputs_of_the_next_row_alike(mixed):
    size, real, alone = mixed.config.batch_size, 0, 0
    for (own, other), plain in zip(mixed.heldout_probes(100), mixed.heldout_batches(100), strict=True):
        count = int((plain["labels"] != IGNORED).any(1).sum())
        for row in range(count):
            alike = [r for r in [*range(row + 1, count), *range(row + 1)] if own["objective"][r] == own["objective"][row]]
            if alike[0] == row:
                alone += 1
                assert (own["labels"][row] == IGNORED).all() and (other["labels"][row] == IGNORED).all()
                continue
            for name, array in plain.items():
                np.testing.assert_array_equal(own[name][row], array[row])
                swapped = name in ("input_ids", "attention_mask")
                np.testing.assert_array_equal(other[name][row], array[alike[0] if swapped else row])
        assert (own["objective"] == other["objective"]).all() and (own["masked"] == other["masked"]).all()
        real += count
    assert real % size and real == -(-mixed.heldout.num_tokens // mixed.mixture.raw_length)
    assert 0 < alone < real / 4


def test_a_process_probes_its_rows_of_the_same_pairs(mixed):
    rows = np.array([1, 2, 7])
    for whole, part in zip(mixed.heldout_probes(100), mixed.heldout_probes(100, rows), strict=True):
        for all_rows, some in zip(whole, part, strict=True):
            for name, array in all_rows.items():
                there = rows[all_rows["decoder_attention_mask"][rows].any(1)]
                np.testing.assert_array_equal(some[name][: len(there)], array[there])


def test_masked_targets_are_all_but_those_that_infilling_shows(mixed):
    for own, _ in mixed.heldout_probes(3):
        targets = own["labels"] != IGNORED
        filled = own["objective"] == list(OBJECTIVES).index("infilling")
        np.testing.assert_array_equal(own["masked"][~filled], targets[~filled])
        assert 0.1 < own["masked"][filled].sum() / targets[filled].sum() < 0.2
