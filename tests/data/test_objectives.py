"""Prefix-LM, mixtures of objectives and the chunks they are made of."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flax_switch.data.objectives import OBJECTIVES, ConcatenatedText, Mixture, SeparateDocuments
from flax_switch.data.prefix_lm import prefix_lm
from flax_switch.data.random_bits import example_keys, fold_in, random_words, uniform
from flax_switch.data.span_corruption import restore


def keys(count: int) -> np.ndarray:
    return example_keys(0, np.zeros(count, np.int64), np.arange(count))


def originals(made, top_sentinel: int) -> list[np.ndarray]:
    """The texts that span corruption made these examples of."""
    rows = zip(*made[:4], strict=True)
    return [restore(i[:n], t[:k], top_sentinel=top_sentinel, num_sentinels=20) for i, n, t, k in rows]


@hypothesis.given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.integers(2, 40), st.integers(2, 40))
def test_targets_go_on_where_the_inputs_end(lengths, inputs_length, targets_length):
    lengths = np.array(lengths)
    tokens = np.arange(len(lengths) * 60).reshape(-1, 60) + 3
    made = prefix_lm(tokens, lengths, keys(len(lengths)), inputs_length=inputs_length, targets_length=targets_length)
    assert made.input_lengths.max() <= inputs_length and made.target_lengths.max() <= targets_length
    for m in range(len(lengths)):
        inputs, targets = made.inputs[m, : made.input_lengths[m]], made.targets[m, : made.target_lengths[m]]
        assert inputs[-1] == targets[-1] == 1 and len(inputs) >= 2
        both = np.concatenate([inputs[:-1], targets[:-1]])
        np.testing.assert_array_equal(both, tokens[m, : len(both)])
        assert len(both) <= lengths[m]
        if lengths[m] >= targets_length and inputs_length - 1 <= lengths[m] - targets_length + 1:
            assert len(targets) == targets_length  # full wherever the text is long enough


def test_every_split_that_fills_the_targets_is_equally_likely():
    count = 20_000
    made = prefix_lm(np.zeros((count, 20), int), np.full(count, 20), keys(count), inputs_length=32, targets_length=6)
    found = np.bincount(made.input_lengths - 1, minlength=16)[1:]
    assert len(found) == 15 and (np.abs(found - count / 15) < 5 * np.sqrt(count / 15)).all()


def test_random_words_are_uniform_and_keys_of_different_examples_epochs_seeds_and_purposes_differ():
    words = random_words(keys(2000), 50)
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 0.01
    assert len(np.unique(words)) == words.size
    all_keys = [example_keys(s, np.array([e]), np.array([i]))[0] for s in range(5) for e in range(5) for i in range(5)]
    assert len(set(all_keys)) == 125
    assert np.abs(np.corrcoef(uniform(keys(20_000)), uniform(fold_in(keys(20_000), 1)))[0, 1]) < 0.03


def test_a_mixture_draws_objectives_at_its_rates_and_each_example_keeps_its_own(prepared):
    mixture = prepared.mixture.replace(span_corruption_rate=3.0, prefix_lm_rate=1.0)
    source = ConcatenatedText(prepared.train, mixture, seed=0)
    ids, epochs = np.divmod(np.arange(4000), 40)[::-1]
    made = source.examples(ids, epochs)
    with_sentinels = (made.inputs > mixture.top_sentinel - 20).any(axis=1)
    assert abs(with_sentinels.mean() - 0.75) < 0.03
    for objective, chosen in (("span_corruption", with_sentinels), ("prefix_lm", ~with_sentinels)):
        rates = dict(span_corruption_rate=0.0, prefix_lm_rate=0.0) | {f"{objective}_rate": 1.0}
        pure = ConcatenatedText(prepared.train, mixture.replace(**rates), seed=0).examples(ids, epochs)
        np.testing.assert_array_equal(pure.target_lengths[chosen], made.target_lengths[chosen])
        width = pure.targets.shape[1]
        np.testing.assert_array_equal(pure.targets[chosen], made.targets[chosen][:, :width])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_to_the_room_that_it_asks_for_and_needs_all_of_it(name, prepared, config, vocabulary):
    rates = {f"{other}_rate": float(other == name) for other in OBJECTIVES}
    mixture = Mixture.of(config.replace(**rates, inputs_length=24, targets_length=30), vocabulary)
    made = ConcatenatedText(prepared.train, mixture, seed=0).examples(np.arange(300), np.zeros(300, int))
    inputs, targets = (0, 24 + 30) if name == "causal_lm" else (24, 30)  # without inputs, targets have the room of both
    assert made.input_lengths.max() <= inputs and made.target_lengths.max() <= targets
    assert 0 < made.input_lengths.max() == inputs or made.target_lengths.max() == targets
    packed = SeparateDocuments(prepared.train, mixture, seed=0)
    made = packed.examples(np.arange(packed.num_examples), np.zeros(packed.num_examples, int))
    assert (made.input_lengths <= packed.input_lengths).all() and (made.target_lengths <= packed.target_lengths).all()
    for array, lengths in ((made.inputs, made.input_lengths), (made.targets, made.target_lengths))[int(not inputs) :]:
        last = np.take_along_axis(array, lengths[:, None] - 1, axis=1)
        assert (last == mixture.eos_id).all() and not array[np.arange(array.shape[1]) >= lengths[:, None]].any()


def test_which_objective_an_example_gets_says_nothing_about_where_its_text_is_split(prepared):
    mixture = prepared.mixture.replace(span_corruption_rate=1.0, prefix_lm_rate=1.0, targets_length=8, inputs_length=64)
    count, length = 6000, 27
    made = mixture(np.full((count, length), 5), np.full(count, length), keys(count))
    continued = ~(made.inputs > mixture.top_sentinel - 20).any(axis=1)
    found = np.bincount(made.input_lengths[continued] - 1, minlength=21)[1:]
    expected = continued.sum() / 20  # prefixes of 1 to 20 tokens leave at least 7 for the targets
    assert len(found) == 20 and (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_where_all_continue_a_prefix_a_chunk_is_what_fills_inputs_and_targets(prepared, config, vocabulary):
    config = config.replace(span_corruption_rate=0.0, prefix_lm_rate=1.0, inputs_length=20, targets_length=9)
    mixture = Mixture.of(config, vocabulary)
    source = ConcatenatedText(prepared.train, mixture, seed=0)
    ids = np.arange(min(source.num_examples, 200))
    made = source.examples(ids, np.zeros_like(ids))
    full = (made.input_lengths == 20) & (made.target_lengths == 9)
    longest = made.input_lengths + made.target_lengths - 2
    assert full.any() and longest.max() == mixture.raw_length == 27  # all of a chunk but two EOS
    assert mixture.raw_length == longest[full].min()


def test_an_epoch_of_chunks_covers_the_text_once_and_the_next_epoch_cuts_elsewhere(prepared):
    source = ConcatenatedText(prepared.train, prepared.mixture, seed=0)
    ids = np.arange(source.num_examples)
    text = prepared.train.tokens.astype(int).tolist()
    starts = []
    for epoch in (0, 1):
        made = source.examples(ids, np.full_like(ids, epoch))
        covered = np.concatenate(originals(made, prepared.mixture.top_sentinel)).tolist()
        start = next(s for s in range(prepared.mixture.raw_length) if text[s : s + 200] == covered[:200])
        assert text[start : start + len(covered)] == covered
        assert len(text) - len(covered) < 2 * prepared.mixture.raw_length
        starts.append(start)
    assert starts[0] != starts[1]


def test_evaluation_covers_all_of_the_text_at_fixed_places(prepared):
    source = ConcatenatedText(prepared.heldout, prepared.mixture, seed=0, whole=True)
    ids = np.arange(source.num_examples)
    made = source.examples(ids, np.zeros_like(ids))
    covered = np.concatenate(originals(made, prepared.mixture.top_sentinel))
    np.testing.assert_array_equal(covered, prepared.heldout.tokens)


def test_separate_documents_never_share_an_example(prepared):
    mixture: Mixture = prepared.mixture
    source = SeparateDocuments(prepared.train, mixture, seed=0)
    assert source.lengths.max() <= mixture.raw_length and source.lengths.min() >= 2
    document = np.searchsorted(prepared.train.offsets, source.starts, side="right") - 1
    assert (source.starts + source.lengths <= prepared.train.offsets[document + 1]).all()
    made = source.examples(np.arange(source.num_examples), np.zeros(source.num_examples, int))
    np.testing.assert_array_equal(made.input_lengths, source.input_lengths)
    np.testing.assert_array_equal(made.target_lengths, source.target_lengths)
