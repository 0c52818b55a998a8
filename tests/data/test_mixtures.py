"""Mixtures: rates are exact in the long run, the order is a function of the position, and it resumes."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_switch.config import ConfigError
from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.data.mixtures import Turns, integer_weights, mixing_rates, mixture_iterator
from flax_switch.data.pairs import Pairs

CONFIG = FinetuneDataConfig(inputs_length=24, targets_length=8, batch_size=6, tasks=(TaskConfig("a"), TaskConfig("b")))


def numbered(first, count, longest=3):
    """Pairs whose inputs hold their number."""
    rng = np.random.default_rng(first)
    inputs = [[first + i] * int(rng.integers(1, longest + 1)) for i in range(count)]
    return Pairs(inputs, [[9]] * count, inputs_length=24, targets_length=8)


def numbers(batch):
    """The numbers of all examples in a batch."""
    segments = batch.get("input_segment_ids", batch["attention_mask"])
    rows = zip(batch["input_ids"], segments, strict=True)
    return [int(ids[segment == s][0]) for ids, segment in rows for s in range(1, segment.max() + 1)]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=5), st.integers(0, 2**40))
def test_after_any_number_of_rows_every_task_has_had_its_share(weights, start):
    turns = Turns((1,) * len(weights), tuple(weights))
    part, index = turns(np.arange(start, start + 300))
    for k, weight in enumerate(weights):
        mine = np.flatnonzero(part == k)
        np.testing.assert_array_equal(np.diff(index[mine]), 1)  # none is skipped, none comes twice
        share = Fraction(weight, sum(weights))
        for at, before in zip(mine.tolist(), index[mine].tolist(), strict=True):
            assert abs(before - share * (start + at)) < len(weights)


def test_a_period_of_the_stream_has_exactly_the_weights():
    part, _ = Turns((1, 1, 1), (5, 2, 3))(np.arange(70, 80))
    assert np.bincount(part).tolist() == [5, 2, 3]
    assert part.tolist() == Turns((1, 1, 1), (5, 2, 3))(np.arange(10))[0].tolist()


def test_rates_are_given_or_follow_from_sizes_limit_and_temperature():
    def rates(sizes, given=(None, None), **settings):
        config = CONFIG.replace(tasks=tuple(TaskConfig(n, rate=r) for n, r in zip("ab", given, strict=True)), **settings)
        return [float(rate) for rate in mixing_rates(config, sizes)]

    assert rates([300, 100]) == [0.75, 0.25]
    assert rates([300, 100], mixing_limit=200) == pytest.approx([2 / 3, 1 / 3])
    assert rates([400, 100], mixing_temperature=2.0) == pytest.approx([2 / 3, 1 / 3])
    assert rates([400, 100], given=(0.1, 0.3)) == [0.25, 0.75]
    with pytest.raises(ConfigError, match="Either every task of a mixture has a rate"):
        rates([1, 1], given=(0.1, None))


def test_weights_are_the_smallest_whole_numbers_in_proportion():
    assert integer_weights([Fraction("0.1"), Fraction("0.3")]) == (1, 3)
    assert integer_weights([Fraction(1, 3), Fraction(1, 6), Fraction(1, 2)]) == (2, 1, 3)
    huge = integer_weights([Fraction(1, 10**9 + 7), Fraction(1, 10**9 + 9)])
    assert sum(huge) <= 2**31 and huge[0] == pytest.approx(huge[1], rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_examples_come_at_their_rates_and_every_example_of_a_task_once_an_epoch(packing):
    tasks = [numbered(10, 40), numbered(100, 60, longest=1)]
    batches = mixture_iterator(tasks, [Fraction(3, 4), Fraction(1, 4)], CONFIG.replace(packing=packing))
    seen = []
    while len(seen) < 600:
        seen += numbers(next(batches))
    first, second = ([n for n in seen if (n < 100) == small] for small in (True, False))
    assert len(first) / len(seen) == pytest.approx(0.75, abs=0.03 if packing else 0.005)
    assert sorted(first[:40]) == sorted(range(10, 50)) and first[:40] != first[40:80]
    assert sorted(second[:60]) == sorted(range(100, 160))


def test_tasks_of_one_size_are_shuffled_each_in_its_own_order():
    batches = mixture_iterator([numbered(10, 40), numbered(100, 40)], [Fraction(1, 2)] * 2, CONFIG)
    seen = [n for _ in range(40) for n in numbers(next(batches))]
    first, second = [n - 10 for n in seen if n < 100][:40], [n - 100 for n in seen if n >= 100][:40]
    assert sorted(first) == sorted(second) and first != second


def test_packed_tasks_keep_their_rates_of_examples_however_many_a_row_holds():
    long = Pairs(
        [[100 + i] * 10 for i in range(60)], [[9]] * 60, inputs_length=24, targets_length=8
    )  # two fit a row, of others four
    batches = mixture_iterator([numbered(10, 40), long], [Fraction(1, 2)] * 2, CONFIG.replace(packing=True))
    seen = []
    while len(seen) < 1200:
        seen += numbers(next(batches))
    assert np.mean([n < 100 for n in seen]) == pytest.approx(0.5, abs=0.02)


def test_the_stream_is_the_same_again_for_any_number_of_processes_and_resumes_from_its_position():
    tasks, rates = [numbered(10, 50), numbered(100, 70)], [Fraction(2, 3), Fraction(1, 3)]
    stream = mixture_iterator(tasks, rates, CONFIG)
    whole = [numbers(next(stream)) for _ in range(5)]
    shares = [mixture_iterator(tasks, rates, CONFIG, rows=np.arange(3) + 3 * i) for i in range(2)]
    assert [numbers(next(shares[0])) + numbers(next(shares[1])) for _ in range(5)] == whole
    again = mixture_iterator(tasks, rates, CONFIG)
    for _ in range(2):
        next(again)
    state = again.get_state()
    later = mixture_iterator(tasks, rates, CONFIG)
    later.set_state(state)
    assert [numbers(next(later)) for _ in range(3)] == whole[2:]
    with pytest.raises(ConfigError, match="another data stream"):
        mixture_iterator(tasks, [Fraction(1, 2)] * 2, CONFIG).set_state(state)
