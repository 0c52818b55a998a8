"""Inputs and targets as one sequence, for decoders alone: what is read, what has a loss, and what is packed."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flax_switch.config import DataConfig
from flax_switch.data.batches import IGNORED, join_batch
from flax_switch.data.examples import Examples
from flax_switch.data.objectives import OBJECTIVES, Mixture
from flax_switch.data.packing import plan_rows
from flax_switch.data.pairs import Pairs, pair_batches
from flax_switch.data.random_bits import example_keys


def examples_of(pairs):
    """Examples of (inputs, targets), both without EOS (1)."""
    inputs, targets = ([[*ids, 1] for ids in side] for side in zip(*pairs, strict=True))
    return Examples(*(part for side in (inputs, targets) for part in _padded(side)))


def _padded(rows):
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, made in zip(rows, ids, strict=True):
        made[: len(row)] = row
    return ids, lengths


texts = st.lists(st.integers(3, 60), max_size=7)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


@hypothesis.given(pairs, st.integers(1, 3))
def test_a_sequence_is_the_start_token_inputs_and_targets_and_targets_alone_have_a_loss(pairs, rows):
    row_of = np.sort(np.arange(len(pairs)) % rows)
    batch = join_batch(examples_of(pairs), row_of, rows, 64, packed=True)
    assert {array.shape for array in batch.values()} == {(rows, 64)}
    for row in range(rows):
        mine = [pair for pair, r in zip(pairs, row_of, strict=True) if r == row]
        read, labels, prefix, segments = [], [], [], []
        for segment, (inputs, targets) in enumerate(mine, 1):
            whole = [0, *inputs, *targets, 1]
            read += whole[:-1]
            labels += [IGNORED] * len(inputs) + whole[1 + len(inputs) :]
            prefix += [1] * (len(inputs) + 1) + [0] * len(targets)
            segments += [segment] * (len(whole) - 1)
        expected = {"decoder_input_ids": read, "labels": labels, "prefix_mask": prefix, "decoder_segment_ids": segments}
        for name, values in expected.items():
            filled = values + [IGNORED if name == "labels" else 0] * (64 - len(values))
            assert batch[name][row].tolist() == filled, name
        assert batch["decoder_attention_mask"][row].tolist() == [1] * len(read) + [0] * (64 - len(read))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_fits_the_rows_of_a_decoder_alone(objective, packing, vocabulary):
    rates = dict.fromkeys((f"{name}_rate" for name in OBJECTIVES), 0.0) | {f"{objective}_rate": 1.0, "prefix_lm_rate": 1.0}
    config = DataConfig(inputs_length=24, targets_length=24, joined=True, packing=packing, **rates)
    mixture = Mixture.of(config, vocabulary)
    lengths = np.arange(2, mixture.raw_length + 1)
    tokens = np.random.default_rng(0).integers(3, 100, (len(lengths), mixture.raw_length))
    keys = example_keys(0, np.zeros_like(lengths), lengths)
    limits = mixture.lengths(lengths) if packing else None
    made = mixture(tokens, lengths, keys, limits=limits)
    if packing:
        plan = plan_rows(*limits, 24, 24, joined=True)
        for row in range(plan.num_rows):
            members = plan.order[plan.offsets[row] : plan.offsets[row + 1]]
            assert (np.maximum(made.input_lengths - 1, 0) + made.target_lengths)[members].sum() <= 48
    batch = join_batch(made, np.arange(len(lengths)), len(lengths), 48)
    assert ((batch["labels"] != IGNORED).sum(1) == made.target_lengths).all()


def test_causal_language_modelling_reads_whole_texts(vocabulary):
    config = DataConfig(inputs_length=10, targets_length=6, joined=True, span_corruption_rate=0.0, causal_lm_rate=1.0)
    mixture = Mixture.of(config, vocabulary)
    assert mixture.raw_length == 15
    tokens = np.arange(30).reshape(2, 15) + 3
    batch = join_batch(mixture(tokens, np.array([15, 4]), example_keys(0, np.zeros(2, int), np.arange(2))), np.arange(2), 2, 16)
    assert batch["labels"].tolist() == [[*tokens[0], 1], [*tokens[1, :4], 1, *[IGNORED] * 11]]
    assert batch["prefix_mask"].sum() == 2


def test_pairs_of_texts_are_joined_too(vocabulary):
    config = DataConfig(inputs_length=12, targets_length=8, batch_size=2, joined=True)
    made = Pairs.encode(["ba ke", "lo"], ["mi", "nu ra"], vocabulary, config)
    (batch,) = pair_batches(made, config)
    for row, (source, target) in enumerate((("ba ke", "mi"), ("lo", "nu ra"))):
        inputs, targets = vocabulary.encode(source), vocabulary.encode(target)
        read = batch["decoder_input_ids"][row, batch["decoder_attention_mask"][row] == 1].tolist()
        assert read == [0, *inputs, *targets]
        assert batch["labels"][row][batch["labels"][row] != IGNORED].tolist() == [*targets, 1]
