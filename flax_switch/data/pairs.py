"""Tasks of inputs and targets, such as fine-tuning data: token ids in, padded or packed batches out.

pairs = Pairs.encode(questions, answers, vocabulary, config)
batches = pair_iterator(pairs, config)        # endless and shuffled, as for pre-training; packed where config.packing
for batch in pair_batches(heldout, config):   # one pass in order, one pair a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64, Integer

from flax_switch.config import BatchConfig, check
from flax_switch.data.batches import Batch
from flax_switch.data.examples import Examples
from flax_switch.data.loader import BatchMaker, TrainIterator, finite_batches
from flax_switch.data.packing import Plan, plan_rows
from flax_switch.data.vocabulary import Vocabulary


class Pairs:
    """Inputs and targets as token ids, cut to their lengths and ended with EOS."""

    def __init__(
        self,
        inputs: Iterable[Sequence[int]],
        targets: Iterable[Sequence[int]],
        *,
        inputs_length: int,
        targets_length: int,
        eos_id: int = 1,
    ):
        """Takes ids without EOS; what does not fit is cut off at the end. Raises `ConfigError` for unequal numbers.

        `truncated_inputs` and `truncated_targets` count those that did not fit.
        """
        self._inputs, self.input_lengths, self.truncated_inputs = ragged(inputs, inputs_length, eos_id)
        self._targets, self.target_lengths, self.truncated_targets = ragged(targets, targets_length, eos_id)
        check(
            len(self.input_lengths) == len(self.target_lengths),
            f"There are {len(self.input_lengths)} inputs but {len(self.target_lengths)} targets; a pair has one of each.",
        )
        self._index()

    def _index(self) -> None:
        self.num_examples = len(self.input_lengths)
        self._input_starts = np.cumsum(self.input_lengths) - self.input_lengths
        self._target_starts = np.cumsum(self.target_lengths) - self.target_lengths

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """Returns the pairs of all parts, one part after another."""
        whole = cls.__new__(cls)
        for name in ("_inputs", "_targets", "input_lengths", "target_lengths"):
            setattr(whole, name, np.concatenate([getattr(part, name) for part in parts]))
        for name in ("truncated_inputs", "truncated_targets"):
            setattr(whole, name, sum(getattr(part, name) for part in parts))
        whole._index()
        return whole

    @classmethod
    def encode(cls, inputs: Sequence[str], targets: Sequence[str], vocabulary: Vocabulary, config: BatchConfig) -> Pairs:
        """Pairs of texts; sentinels such as `<extra_id_0>` may be part of them."""
        return cls(
            map(vocabulary.encode, inputs),
            map(vocabulary.encode, targets),
            inputs_length=config.inputs_length,
            targets_length=config.targets_length,
            eos_id=vocabulary.eos_id,
        )

    def examples(self, ids: Integer[np.ndarray, " M"], epochs: Integer[np.ndarray, " M"]) -> Examples:
        """Returns the pairs with these numbers, which are the same in every epoch."""
        input_lengths, target_lengths = self.input_lengths[ids], self.target_lengths[ids]
        return Examples(
            _rows(self._inputs, self._input_starts[ids], input_lengths),
            input_lengths,
            _rows(self._targets, self._target_starts[ids], target_lengths),
            target_lengths,
        )

    @property
    def fingerprint(self) -> str:
        """Changes with any token."""
        digest = hashlib.blake2b(digest_size=10)
        for array in (self._inputs, self.input_lengths, self._targets, self.target_lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()


def pair_iterator(
    pairs: Pairs, config: BatchConfig, *, rows: Integer[np.ndarray, " rows"] | None = None, num_workers: int | None = None
) -> TrainIterator:
    """Returns endless batches of pairs, shuffled, resumable and shared out among processes as `Prepared.train_iterator`'s are."""
    return TrainIterator(
        BatchMaker.of(pairs, config, plan_pairs(pairs, config) if config.packing else None),
        batch_size=config.batch_size,
        seed=config.seed,
        fingerprint=f"{pairs.fingerprint}{' packed' if config.packing else ''}",
        shuffle=config.shuffle,
        rows=rows,
        num_workers=config.num_workers if num_workers is None else num_workers,
        prefetch=config.prefetch,
    )


def plan_pairs(pairs: Pairs, config: BatchConfig) -> Plan:
    """Returns which pairs share a row."""
    lengths = (pairs.input_lengths, pairs.target_lengths, config.inputs_length, config.targets_length)
    return plan_rows(*lengths, seed=config.seed, joined=config.joined)


def pair_batches(
    pairs: Pairs, config: BatchConfig, count: int | None = None, *, rows: Integer[np.ndarray, " rows"] | None = None
) -> Iterator[Batch]:
    """Returns the first `count` (or all) batches of one pass in order, a pair a row; rows of padding fill up the last one."""
    return finite_batches(BatchMaker.of(pairs, config), config.batch_size, count, seed=None, rows=rows)


def ragged(
    sequences: Iterable[Sequence[int]], length: int, eos_id: int
) -> tuple[Int32[np.ndarray, " total"], Int64[np.ndarray, " N"], int]:
    """Returns ids end to end, each sequence cut and closed with EOS, their lengths, and how many sequences were cut."""
    ended, truncated = [], 0
    for ids in sequences:
        truncated += len(ids) >= length
        ended.append(np.array([*ids[: length - 1], eos_id], np.int32))
    lengths = np.array([len(ids) for ids in ended], np.int64)
    return np.concatenate(ended) if ended else np.zeros(0, np.int32), lengths, truncated


def _rows(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Int32[np.ndarray, "M L"]:
    columns = np.arange(int(lengths.max(initial=1)))
    within = columns < lengths[:, None]
    return np.where(within, flat[np.where(within, starts[:, None] + columns, 0)] if len(flat) else 0, 0).astype(np.int32)
