"""Several tasks, or several sources of text, in one stream: rates, and which of them each row of the stream comes from.

Rows take turns by integer weights, in closed form: after n rows a task has had its share of n to within the number of tasks, and
row n needs no row before it. So rates are exact in the long run, and a stream resumes from its position alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, Integer

from flax_switch.config import DataConfig
from flax_switch.config.finetuning import FinetuneDataConfig
from flax_switch.data.cache import Tokens
from flax_switch.data.examples import Examples
from flax_switch.data.loader import BatchMaker, Source, TrainIterator
from flax_switch.data.objectives import Mixture, in_order
from flax_switch.data.packing import Plan
from flax_switch.data.pairs import Pairs, plan_pairs
from flax_switch.data.random_bits import example_keys

_LARGEST = 2**30  # of a sum of weights: products of a remainder and a weight stay within 63 bits


@dataclasses.dataclass(frozen=True)
class Turns:
    """Parts of a table of rows, one after another, that take turns in a stream.

    `sizes` are the numbers of rows of the parts, `weights` the whole numbers of rows each gets out of sum(weights).
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]

    def __call__(self, places: Int64[np.ndarray, " M"]) -> tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
        """Returns (part, how many rows of that part came before) of each place in the stream."""
        part = np.full(places.shape, len(self.weights) - 1)
        index = np.zeros_like(places)
        left, among = np.ones(places.shape, bool), places  # not yet given to a part; their place among such
        for k, weight in enumerate(self.weights):
            total = sum(self.weights[k:])
            before, after = _scaled(among, weight, total), _scaled(among + 1, weight, total)
            mine = left & (after > before)
            part[mine], index[mine] = k, before[mine]
            left, among = left & ~mine, among - before
        return part, index


def _scaled(n: Int64[np.ndarray, " M"], weight: int, total: int) -> Int64[np.ndarray, " M"]:
    """Returns floor(n * weight / total), exactly."""
    whole, rest = np.divmod(n, total)
    return whole * weight + rest * weight // total


def mixing_rates(config: FinetuneDataConfig | DataConfig, sizes: Sequence[int]) -> list[Fraction]:
    """Returns the share that each task or source of the mixture gets: as given, or min(size, limit) ** (1 / temperature).

    Limit and temperature are those of T5 (1910.10683, section 3.5.2); sources of text have no limit, as in mT5 (2010.11934).
    """
    given = [one.rate for one in config.mixture]
    if None not in given:
        rates = [Fraction(str(rate)) for rate in given]
    else:
        limit = config.mixing_limit if isinstance(config, FinetuneDataConfig) else None
        counts = [min(n, limit or n) for n in sizes]
        exponent = 1.0 / config.mixing_temperature
        rates = [Fraction(n) if exponent == 1.0 else Fraction(n**exponent) for n in counts]
    return [rate / sum(rates) for rate in rates]


def integer_weights(rates: Sequence[Fraction]) -> tuple[int, ...]:
    """Returns the smallest whole numbers in proportion to the rates; nearly in proportion where the smallest would be huge."""
    common = math.lcm(*(rate.denominator for rate in rates))
    whole = [int(rate * common) for rate in rates]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= _LARGEST:
        return tuple(n // divisor for n in whole)
    return tuple(max(1, round(rate / sum(rates) * _LARGEST)) for rate in rates)


def mixture_iterator(
    tasks: Sequence[Pairs],
    rates: Sequence[Fraction],
    config: FinetuneDataConfig,
    *,
    rows: Integer[np.ndarray, " rows"] | None = None,
) -> TrainIterator:
    """Makes endless batches (or the given rows of each) of several tasks' pairs at these rates, shuffled and resumable.

    With packing, examples of one task share a row; tasks whose rows hold more examples get as many fewer rows.
    """
    sizes, plan = [pairs.num_examples for pairs in tasks], None
    if config.packing:
        plans = [plan_pairs(pairs, config) for pairs in tasks]
        sizes, plan = [p.num_rows for p in plans], _joined(plans)
    weights = integer_weights([r * Fraction(n, t.num_examples) for r, n, t in zip(rates, sizes, tasks, strict=True)])
    kind = f"{' packed' if config.packing else ''} {weights}"
    return TrainIterator(
        BatchMaker.of(Pairs.joined(tasks), config, plan),
        turns=Turns(tuple(sizes), weights),
        batch_size=config.batch_size,
        seed=config.seed,
        fingerprint=" ".join(pairs.fingerprint for pairs in tasks) + kind,
        shuffle=config.shuffle,
        rows=rows,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
    )


def text_maker(texts: Sequence[Tokens], mixture: Mixture, seed: int, *, whole: bool) -> tuple[BatchMaker, tuple[int, ...]]:
    """Returns what makes batches of texts whose rows stand one after another, and how many rows each has.

    `whole` as in `ConcatenatedText`.
    """
    makers = [BatchMaker.of_text(text, mixture, seed_of(seed, k), whole=whole) for k, text in enumerate(texts)]
    sizes = tuple(maker.num_rows for maker in makers)
    if len(makers) == 1:
        return makers[0], sizes
    plans = [maker.plan for maker in makers if maker.plan is not None]
    source = JoinedText([maker.source for maker in makers])
    return BatchMaker.of(source, mixture.config, _joined(plans) if plans else None), sizes


def seed_of(seed: int, part: int) -> int:
    """Returns a seed for each part of a mixture; of the first it is the mixture's."""
    return seed if part == 0 else int(example_keys(seed, np.array([part]), np.array([-1]))[0] >> np.uint64(1))


class JoinedText:
    """The examples of several texts, those of one text after those of another."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([part.num_examples for part in parts])
        self.num_examples = int(self._ends[-1])

    def examples(self, ids: Integer[np.ndarray, " M"], epochs: Integer[np.ndarray, " M"]) -> Examples:
        """Returns the examples with these numbers in these epochs."""
        part, made = np.searchsorted(self._ends, ids, side="right"), []
        for k in np.unique(part) if len(ids) else (0,):  # a process may have no row of a batch
            rows, one = np.flatnonzero(part == k), self.parts[k]
            made.append((rows, one.examples(ids[rows] - (int(self._ends[k]) - one.num_examples), epochs[rows])))
        return in_order(made, len(ids))


def _joined(plans: Sequence[Plan]) -> Plan:
    """Returns the plan for all tasks' examples laid one after another."""
    examples = np.cumsum([0, *(len(plan.order) for plan in plans)])
    order = np.concatenate([plan.order + first for plan, first in zip(plans, examples, strict=False)])
    offsets = np.concatenate([[0], *(plan.offsets[1:] + first for plan, first in zip(plans, examples, strict=False))])
    return Plan(order, offsets)
