"""Pairs of inputs and targets, padded or packed."""

import numpy as np
import pytest

from flax_switch.config import ConfigError, DataConfig
from flax_switch.data.batches import IGNORED
from flax_switch.data.pairs import Pairs, pair_batches, pair_iterator

CONFIG = DataConfig(inputs_length=24, targets_length=12, batch_size=4, num_sentinels=20)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    inputs = [rng.integers(3, 250_000, rng.integers(1, 12)).tolist() for _ in range(50)]
    targets = [rng.integers(3, 250_000, rng.integers(1, 6)).tolist() for _ in range(50)]
    return Pairs(inputs, targets, inputs_length=24, targets_length=12), list(zip(inputs, targets, strict=True))


def unpacked(batch):
    """Every (inputs, targets) of a batch without EOS, packed or not."""
    rows = range(len(batch["labels"]))
    segments = batch.get("input_segment_ids", batch["attention_mask"])
    target_segments = batch.get("decoder_segment_ids", batch["decoder_attention_mask"])
    for r in rows:
        for s in range(1, segments[r].max() + 1):
            inputs, targets = batch["input_ids"][r][segments[r] == s], batch["labels"][r][target_segments[r] == s]
            assert inputs[-1] == targets[-1] == 1
            yield inputs[:-1].tolist(), targets[:-1].tolist()


def test_one_pass_gives_every_pair_in_order_and_fills_the_last_batch_with_padding(pairs):
    data, expected = pairs
    batches = list(pair_batches(data, CONFIG))
    assert len(batches) == 13 and batches[-1]["labels"].shape == (4, 12)
    assert [pair for batch in batches for pair in unpacked(batch)] == expected
    assert (batches[-1]["labels"][2:] == IGNORED).all()
    assert len(list(pair_batches(data, CONFIG, 3))) == 3


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_of_training_gives_every_pair_once(pairs, packing):
    data, expected = pairs
    config = CONFIG.replace(packing=packing, batch_size=1)
    iterator = pair_iterator(data, config)
    found = []
    while len(found) < 50:
        found += unpacked(next(iterator))
    assert sorted(found) == sorted(expected) and found != expected


def test_packing_needs_fewer_rows_and_resumes_exactly(pairs):
    data, _ = pairs
    config = CONFIG.replace(packing=True)
    iterator = pair_iterator(data, config)
    assert iterator._stream.make.num_rows < 25
    state = iterator.get_state()
    first = next(iterator)
    again = pair_iterator(data, config)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["input_ids"], first["input_ids"])
    with pytest.raises(ConfigError, match="fingerprint"):
        pair_iterator(data, CONFIG).set_state(state)


def test_long_pairs_are_cut_and_still_end_with_eos():
    data = Pairs([[5] * 100], [[6] * 100], inputs_length=24, targets_length=12)
    (batch,) = pair_batches(data, CONFIG.replace(batch_size=1))
    np.testing.assert_array_equal(batch["input_ids"][0], [5] * 23 + [1])
    np.testing.assert_array_equal(batch["labels"][0], [6] * 11 + [1])


def test_what_was_cut_is_counted_and_what_just_fits_is_not():
    data = Pairs([[5] * n for n in (22, 23, 24, 25)], [[6] * n for n in (3, 11, 12, 11)], inputs_length=24, targets_length=12)
    assert (data.truncated_inputs, data.truncated_targets) == (2, 1)
    assert data.input_lengths.tolist() == [23, 24, 24, 24] and data.target_lengths.tolist() == [4, 12, 12, 12]


def test_texts_are_encoded_with_their_sentinels(vocabulary):
    data = Pairs.encode(["ba <extra_id_0> lo"], ["<extra_id_0> ke"], vocabulary, CONFIG)
    (batch,) = pair_batches(data, CONFIG)
    assert vocabulary.decode(batch["input_ids"][0][:9], skip_special_tokens=False).startswith("ba<extra_id_0> lo</s>")
    assert batch["labels"][0, 0] == vocabulary.sentinel_id(0)
    assert (batch["labels"][1:] == IGNORED).all()


def test_unequal_numbers_of_inputs_and_targets_are_an_error():
    with pytest.raises(ConfigError, match="2 inputs but 1 targets"):
        Pairs([[3], [4]], [[5]], inputs_length=4, targets_length=4)
