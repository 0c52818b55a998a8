"""Iterators over batches, on grain: global shuffle, prefetching threads, worker processes.

A training stream is random-access: batch i is a pure function of (seed, i), so that neither workers nor a restart can change
it, and the state of an iterator is the number of its next batch. A batch is defined for all processes together and each makes
the rows of it that its devices hold, so neither the number of processes nor the mesh changes the stream. This is the one module
that imports grain, which in turn imports jax where it is installed.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from flax_switch.config import BatchConfig, ConfigError, check
from flax_switch.data.batches import IGNORED, Batch, describe_targets, join_batch, pack_batch, pad_batch, pad_rows
from flax_switch.data.cache import Tokens
from flax_switch.data.examples import Examples, span_of_each
from flax_switch.data.objectives import ConcatenatedText, Mixture, SeparateDocuments
from flax_switch.data.packing import Plan, plan_rows
from flax_switch.data.random_bits import example_keys

_ENDLESS = 2**40  # groups of batches
WORKER_DIED = (
    "A data worker died. Worker processes import the main script again, so a script must start its work under "
    "`if __name__ == '__main__':`; data.num_workers=0 needs no such guard."
)
_ROWS_AT_ONCE = 256  # small batches are made several at a time: array operations on few rows cost as much as on many


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
    joined: bool = False  # inputs and targets as one sequence

    @classmethod
    def of(cls, source: Source, config: BatchConfig, plan: Plan | None = None) -> BatchMaker:
        """Makes batches of the form that a config asks for."""
        return cls(source, config.inputs_length, config.targets_length, plan, config.joined)

    @classmethod
    def of_text(cls, text: Tokens, mixture: Mixture, seed: int, *, whole: bool) -> BatchMaker:
        """Makes batches of documents: end to end, or with `data.packing` each by itself; `whole` as in `ConcatenatedText`."""
        config = mixture.config
        if not config.packing:
            return cls.of(ConcatenatedText(text, mixture, seed, whole=whole), config)
        source = SeparateDocuments(text, mixture, seed)
        lengths = (source.input_lengths, source.target_lengths, config.inputs_length, config.targets_length)
        return cls.of(source, config, plan_rows(*lengths, seed=seed, joined=config.joined))

    @property
    def num_rows(self) -> int:
        return self.source.num_examples if self.plan is None else self.plan.num_rows

    def __call__(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """Returns the batch of these rows in these epochs."""
        length = self.inputs_length + self.targets_length
        if self.plan is None:
            examples = self.source.examples(rows, epochs)
            if self.joined:
                return join_batch(examples, np.arange(len(rows)), len(rows), length)
            return pad_batch(examples, self.inputs_length, self.targets_length)
        first = self.plan.offsets[rows]
        place, offset = span_of_each(self.plan.offsets[rows + 1] - first)
        examples = self.source.examples(self.plan.order[first[place] + offset], epochs[place])
        if self.joined:
            return join_batch(examples, place, len(rows), length, packed=True)
        return pack_batch(examples, place, len(rows), self.inputs_length, self.targets_length)


class Parts(Protocol):
    """Parts of the table of rows that take turns in the stream (`flax_switch.data.mixtures.Turns`)."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def __call__(self, places: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class _AllRows:
    """All rows as one part."""

    sizes: tuple[int]

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(places), places


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One process's part of the endless sequence of training batches, from batch `first` on: grain reads groups of it by index."""

    make: BatchMaker
    parts: Parts
    batch_size: int
    seed: int
    shuffle: bool
    rows: np.ndarray  # which of a batch's rows this process makes
    first: int = 0

    def __len__(self) -> int:
        return _ENDLESS

    @property
    def size(self) -> int:
        """Rows of this process's part of a batch."""
        return len(self.rows)

    @property
    def group(self) -> int:
        """Batches in a group."""
        return max(_ROWS_AT_ONCE // self.size, 1)

    def __getitem__(self, index: int) -> list[Batch]:
        batches = self.first + index * self.group + np.arange(self.group)
        places = batches[:, None] * self.batch_size + self.rows
        part, places = self.parts(places.ravel())
        sizes = np.array(self.parts.sizes)
        epochs, rows = np.divmod(places, sizes[part])
        if self.shuffle:
            rows = self._shuffled(rows, epochs, part)
        made = self.make((np.cumsum(sizes) - sizes)[part] + rows, epochs)
        return [{k: a[i : i + self.size] for k, a in made.items()} for i in range(0, len(rows), self.size)]

    def _shuffled(self, rows: np.ndarray, epochs: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Returns a permutation of each part's rows, another one in each epoch."""
        seeds = (example_keys(self.seed, epochs, part) >> np.uint64(32)).tolist()
        last = (np.array(self.parts.sizes) - 1)[part].tolist()
        shuffle = grain.experimental.index_shuffle
        each = zip(rows.tolist(), last, seeds, strict=True)
        return np.array([shuffle(row, max_index=end, seed=seed, rounds=4) for row, end, seed in each])


class TrainIterator:
    """Endless training batches, or the given rows of each, from `get_state()` of any earlier iterator on."""

    def __init__(
        self,
        make: BatchMaker,
        *,
        batch_size: int,
        seed: int,
        fingerprint: str,
        shuffle: bool = True,
        rows: Integer[np.ndarray, " rows"] | None = None,
        num_workers: int = 0,
        prefetch: int = 8,
        turns: Parts | None = None,
    ):
        check(make.num_rows > 0, "There is not a single training example; the corpus is too small.")
        self._stream = _Stream(make, turns or _AllRows((make.num_rows,)), batch_size, seed, shuffle, _rows_of(batch_size, rows))
        self._identity = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle, "fingerprint": fingerprint}
        self._num_workers, self._prefetch = num_workers, prefetch
        self._next_batch = 0
        self._groups: Any = None  # grain's iterator over lists of batches
        self._made: collections.deque[Batch] = collections.deque()

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        if not self._made:
            self._made.extend(self._next_group())
        self._next_batch += 1
        return self._made.popleft()

    def _next_group(self) -> list[Batch]:
        if self._groups is None:
            self._groups = self._start()
        try:
            return next(self._groups)
        except RuntimeError as error:
            if self._num_workers:
                error.add_note(WORKER_DIED)
            raise

    def _start(self) -> Iterator[list[Batch]]:
        ahead = -(-self._prefetch // self._stream.group)  # groups held ready
        groups = grain.MapDataset.source(dataclasses.replace(self._stream, first=self._next_batch))
        if self._num_workers == 0:
            return iter(groups.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead + 1)))
        if not flags.FLAGS.is_parsed():  # grain's workers read flags, which a program without absl's app never parses
            flags.FLAGS.mark_as_parsed()
        in_worker = groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        # Batches travel through pipes: shared memory is often small in containers, and what a killed run leaves there stays.
        in_worker = grain.experimental.WithOptionsIterDataset(in_worker, grain.experimental.DatasetOptions(min_shm_size=2**62))
        per_worker = -(-ahead // self._num_workers)
        options = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=per_worker)
        return iter(in_worker.mp_prefetch(options, worker_init_fn=live_and_die_with_the_parent))

    def get_state(self) -> dict[str, Any]:
        """Returns where the stream stands, as a JSON-able dict; valid for any number of workers and processes."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `get_state` was called.

        Raises `ConfigError` where the state is of another stream: another corpus, vocabulary, seed or batch size.
        """
        check_position(state, self._identity)
        self.close()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        """Stops prefetching threads and worker processes."""
        self._made.clear()
        if self._groups is not None:
            self._groups.close()
            self._groups = None


def check_position(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises `ConfigError` that names what differs where a saved position is of another stream."""
    differing = [f"{k} ({state.get(k)!r}, now {v!r})" for k, v in identity.items() if state.get(k) != v]
    if differing:
        raise ConfigError(
            f"The saved position is of another data stream; these differ: {', '.join(differing)}. A fingerprint stands for "
            "corpus, vocabulary and objectives. Restore those settings, or start in a new workdir."
        )


def live_and_die_with_the_parent(worker_index: int = 0, worker_count: int = 1) -> None:
    """Has a worker ignore Ctrl-C, which is the parent's to handle, and end when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def finite_batches(
    make: BatchMaker,
    batch_size: int,
    count: int | None = None,
    *,
    seed: int | None = 0,
    rows: Integer[np.ndarray, " rows"] | None = None,
) -> Iterator[Batch]:
    """Yields the first `count` (or all) batches of one pass in a fixed order; the last is filled up with rows of padding.

    `seed` shuffles; None keeps the order. `rows` are those to make of each batch, ascending; None is all of them.
    """
    rows = _rows_of(batch_size, rows)
    for order in _in_batches(make.num_rows, batch_size, count, seed):
        chosen = order[rows[rows < len(order)]]
        yield pad_rows(make(chosen, np.zeros_like(chosen)), len(rows))


def probe_batches(
    source: Source,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    count: int,
    *,
    seed: int,
    rows: Integer[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[Batch, Batch]]:
    """Yields pairs of batches with the same targets, one example a row: with their own inputs, and with another row's.

    The other row is the next one of the batch with the same objective: inputs of another objective would mislead the model about
    its task, too. A row whose objective no other row of its batch has is left out: it has no labels. Both batches have
    `batches.describe_targets`' arrays. The rows are those of `finite_batches` for the same seed; rows of padding fill the last up.
    """
    rows = _rows_of(batch_size, rows)
    for order in _in_batches(source.num_examples, batch_size, count, seed):
        examples = source.examples(order, np.zeros_like(order))
        described = describe_targets(examples, targets_length)
        other = _next_alike(described["objective"])
        swapped = examples._replace(inputs=examples.inputs[other], input_lengths=examples.input_lengths[other])
        chosen, alone = rows[rows < len(order)], other == np.arange(len(order))
        described["masked"][alone] = 0
        made = []
        for each in (examples, swapped):
            batch = {**pad_batch(each, inputs_length, targets_length), **described}
            batch["labels"] = np.where(alone[:, None], np.int32(IGNORED), batch["labels"])
            made.append(pad_rows({name: array[chosen] for name, array in batch.items()}, len(rows)))
        yield made[0], made[1]


def _next_alike(objective: Integer[np.ndarray, " M"]) -> Integer[np.ndarray, " M"]:
    """Returns for every row the next row of the same objective, the last one's being the first; itself where it is alone."""
    following = np.arange(len(objective))
    for one in np.unique(objective):
        places = np.flatnonzero(objective == one)
        following[places] = np.roll(places, -1)
    return following


def _in_batches(num_rows: int, batch_size: int, count: int | None, seed: int | None) -> Iterator[np.ndarray]:
    """Yields the row numbers of the first `count` (or all) batches of one pass; the last may be shorter."""
    order = np.arange(num_rows) if seed is None else np.random.default_rng(seed).permutation(num_rows)
    available = -(-num_rows // batch_size)
    for index in range(available if count is None else min(count, available)):
        yield order[index * batch_size : (index + 1) * batch_size]


def _rows_of(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    return np.arange(batch_size) if rows is None else np.asarray(rows)
