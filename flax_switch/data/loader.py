"""Iterators over batches, on grain: global shuffle, endless repetition, prefetching threads or worker processes.

A training stream is random-access: batch i is a pure function of (seed, i), so neither workers nor a restart can change it, and an
iterator's state is the number of the next batch. Batches are made for all processes and each takes its rows, so their number does
not change the stream either. This is the one module that imports grain, which itself imports jax if it is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from flax_switch.config import ConfigError, check
from flax_switch.data.batches import Batch, pack_batch, pad_batch, pad_rows
from flax_switch.data.examples import Examples, span_of_each
from flax_switch.data.packing import Plan


class Source(Protocol):
    """Examples by number and epoch."""

    num_examples: int

    def examples(self, ids: np.ndarray, epochs: np.ndarray) -> Examples: ...


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Batches out of row numbers. A row is an example, or with a packing plan several."""

    source: Source
    inputs_length: int
    targets_length: int
    plan: Plan | None = None

    @property
    def num_rows(self) -> int:
        return self.source.num_examples if self.plan is None else self.plan.num_rows

    def __call__(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """The batch of these rows in these epochs."""
        if self.plan is None:
            return pad_batch(self.source.examples(rows, epochs), self.inputs_length, self.targets_length)
        first, counts = self.plan.offsets[rows], np.diff(self.plan.offsets)[rows]
        place, offset = span_of_each(counts)
        examples = self.source.examples(self.plan.order[first[place] + offset], epochs[place])
        return pack_batch(examples, place, len(rows), self.inputs_length, self.targets_length)


@dataclasses.dataclass(frozen=True)
class _ProcessBatch:
    """Maps (number of the batch, its shuffled rows over all processes) to this process's part of it."""

    make: BatchMaker
    process_index: int
    process_count: int

    def __call__(self, index: int, rows: np.ndarray) -> Batch:
        size = len(rows) // self.process_count
        mine = slice(self.process_index * size, (self.process_index + 1) * size)
        epochs = (index * len(rows) + np.arange(len(rows))) // self.make.num_rows
        return self.make(rows[mine], epochs[mine])


class TrainIterator:
    """Endless training batches of one process, from `get_state()` of any earlier iterator on."""

    def __init__(
        self,
        make: BatchMaker,
        *,
        batch_size: int,
        seed: int,
        fingerprint: str,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        prefetch: int = 8,
    ):
        check(
            batch_size % process_count == 0,
            f"data.batch_size ({batch_size}) must be a multiple of the number of processes ({process_count}).",
        )
        check(make.num_rows > 0, "There is not a single training example; the corpus is too small.")
        rows = grain.MapDataset.range(make.num_rows)
        if shuffle:
            rows = rows.shuffle(seed=seed % 2**32)
        batches = rows.repeat().batch(batch_size, batch_fn=np.asarray)
        self._dataset = batches.map_with_index(_ProcessBatch(make, process_index, process_count))
        self._stream = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle, "fingerprint": fingerprint}
        self._num_workers, self._prefetch = num_workers, prefetch
        self._next_batch = 0
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if self._num_workers:
                error.add_note(
                    "A data worker died. Worker processes import the main script again, so a script must start its work "
                    "under `if __name__ == '__main__':`; data.num_workers=0 needs no such guard."
                )
            raise
        self._next_batch += 1
        return batch

    def _start(self) -> Iterator[Batch]:
        remaining = self._dataset[self._next_batch :] if self._next_batch else self._dataset
        if self._num_workers == 0:
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(self._prefetch, 2))
            return iter(remaining.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():  # grain's workers read flags; a program without absl's app never parses them
            flags.FLAGS.mark_as_parsed()
        sequential = remaining.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        per_worker = max(self._prefetch // self._num_workers, 1)
        return iter(sequential.mp_prefetch(grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=per_worker)))

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as a JSON-able dict; valid for any number of workers and processes."""
        return {"next_batch": self._next_batch, **self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `get_state` was called.

        Raises `ConfigError` where the state is of another stream: another corpus, vocabulary, seed or batch size.
        """
        differing = [f"{k} ({state.get(k)!r}, now {v!r})" for k, v in self._stream.items() if state.get(k) != v]
        if differing:
            raise ConfigError(
                f"The saved position is of another data stream; these differ: {', '.join(differing)}. A fingerprint stands for "
                "corpus, vocabulary and objectives. Restore those settings, or start in a new workdir."
            )
        self.close()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        """Stops prefetching threads and worker processes."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def finite_batches(
    make: BatchMaker,
    batch_size: int,
    count: int | None = None,
    *,
    seed: int | None = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The first `count` (or all) batches of one pass in a fixed order; the last is filled up with rows of padding.

    `seed` shuffles; None keeps the order. Each process gets its rows of each batch.
    """
    check(
        batch_size % process_count == 0,
        f"A batch of {batch_size} cannot be divided among {process_count} processes; make it a multiple.",
    )
    order = np.arange(make.num_rows)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    size = batch_size // process_count
    available = -(-len(order) // batch_size)
    for index in range(available if count is None else min(count, available)):
        start = index * batch_size + process_index * size
        rows = order[start : min(start + size, (index + 1) * batch_size)]
        yield pad_rows(make(rows, np.zeros_like(rows)), size)
