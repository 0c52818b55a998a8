"""Batches: padding, shifting, packing and which labels count as text."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flax_switch.config import ConfigError
from flax_switch.data.batches import IGNORED, pack_batch, pad_batch, pad_rows, text_token_mask
from flax_switch.data.examples import Examples
from flax_switch.data.packing import plan_rows
from flax_switch.data.statistics import target_token_counts, unigram_entropy


def examples(input_lengths, target_lengths, seed=0) -> Examples:
    """Random examples of these lengths (EOS included)."""
    rng = np.random.default_rng(seed)

    def side(lengths):
        lengths = np.array(lengths, np.int64)
        values = rng.integers(3, 90, (len(lengths), max(lengths.max(initial=0), 1))).astype(np.int32)
        values[np.arange(values.shape[1]) >= lengths[:, None]] = 0
        values[np.arange(len(lengths)), lengths - 1] = 1
        return values, lengths

    return Examples(*side(input_lengths), *side(target_lengths))


def test_a_padded_batch_shifts_targets_right_and_masks_padding():
    made = examples([3, 5], [2, 4])
    batch = pad_batch(made, 6, 4)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "input_ids": ((2, 6), "int32"),
        "decoder_input_ids": ((2, 4), "int32"),
        "labels": ((2, 4), "int32"),
        "attention_mask": ((2, 6), "int32"),
        "decoder_attention_mask": ((2, 4), "int32"),
    }
    a, b = made.targets[0, 0], made.targets[1, :3]
    np.testing.assert_array_equal(batch["labels"], [[a, 1, IGNORED, IGNORED], [*b, 1]])
    np.testing.assert_array_equal(batch["decoder_input_ids"], [[0, a, 0, 0], [0, *b]])
    np.testing.assert_array_equal(batch["decoder_attention_mask"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch["input_ids"][:, :5], made.inputs)


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=200)


@hypothesis.given(lengths, st.integers(0, 100))
def test_a_packing_plan_holds_every_example_once_and_no_row_overflows(pairs, seed):
    inputs, targets = np.array(pairs).T
    plan = plan_rows(inputs, targets, 12, 8, seed=seed)
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(len(pairs)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(pairs)
    for start, end in zip(plan.offsets[:-1], plan.offsets[1:], strict=True):
        row = plan.order[start:end]
        assert len(row) and inputs[row].sum() <= 12 and targets[row].sum() <= 8


def test_packing_fills_rows_well():
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(5, 60, 3000), rng.integers(2, 15, 3000)
    plan = plan_rows(inputs, targets, 128, 64)
    assert inputs.sum() > 0.93 * plan.num_rows * 128


def test_an_example_that_fits_no_row_is_an_error():
    with pytest.raises(ConfigError, match="does not fit rows of"):
        plan_rows(np.array([5, 13]), np.array([2, 2]), 12, 8)


@hypothesis.given(lengths, st.integers(0, 100))
def test_unpacking_a_packed_batch_gives_back_each_example(pairs, seed):
    inputs, targets = np.array(pairs).T
    plan = plan_rows(inputs, targets, 12, 8, seed=seed)
    made = examples(inputs[plan.order], targets[plan.order])
    rows = np.repeat(np.arange(plan.num_rows), np.diff(plan.offsets))
    batch = pack_batch(made, rows, plan.num_rows, 12, 8)
    for m, r in enumerate(rows):
        segment = m - plan.offsets[r] + 1
        here = batch["input_segment_ids"][r] == segment
        np.testing.assert_array_equal(batch["input_ids"][r, here], made.inputs[m, : made.input_lengths[m]])
        assert (np.diff(np.flatnonzero(here)) == 1).all()
        here = batch["decoder_segment_ids"][r] == segment
        target = made.targets[m, : made.target_lengths[m]]
        np.testing.assert_array_equal(batch["labels"][r, here], target)
        np.testing.assert_array_equal(batch["decoder_input_ids"][r, here], [0, *target[:-1]])  # each begins with pad
        assert (np.diff(np.flatnonzero(here)) == 1).all()
    for side, ids in (("input", "input_ids"), ("decoder", "decoder_input_ids")):
        padding = batch[f"{side}_segment_ids"] == 0
        mask = batch["attention_mask" if side == "input" else "decoder_attention_mask"]
        np.testing.assert_array_equal(mask, ~padding)
        assert not batch[ids][padding].any()
    assert (batch["labels"][batch["decoder_segment_ids"] == 0] == IGNORED).all()
    assert all(a.dtype == np.int32 for a in batch.values())


def test_one_example_a_row_packs_to_what_padding_gives():
    made = examples([3, 5, 6], [2, 4, 1])
    padded, packed = pad_batch(made, 6, 4), pack_batch(made, np.arange(3), 3, 6, 4)
    for name in padded:
        np.testing.assert_array_equal(padded[name], packed[name])


def test_rows_of_padding_have_no_loss_and_no_attention():
    batch = pad_rows(pad_batch(examples([3], [2]), 6, 4), 3)
    assert (batch["labels"][1:] == IGNORED).all()
    assert not any(batch[name][1:].any() for name in batch if name != "labels")


def test_text_tokens_are_labels_that_are_neither_padding_nor_eos_nor_sentinels():
    labels = np.array([[119, 5, 99, 1, IGNORED], [100, 2, 3, 0, IGNORED]])
    np.testing.assert_array_equal(text_token_mask(labels, num_pieces=100), [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]])


def test_unigram_entropy_is_that_of_the_counted_tokens():
    labels = np.array([[5] * 4 + [6] * 2 + [7] * 2 + [1, 119, IGNORED]])
    counts = target_token_counts([{"labels": labels}, {"labels": labels}], num_pieces=100)
    assert (counts[5], counts[6], counts.sum()) == (8, 4, 16)
    assert np.isclose(unigram_entropy(counts), 1.5 * np.log(2))
    assert np.isclose(unigram_entropy(np.full(64, 3)), np.log(64))
    assert np.isclose(unigram_entropy(np.array([1, 0, 1, 2])), 1.5 * np.log(2))
    assert unigram_entropy(np.zeros(4, int)) == 0.0
