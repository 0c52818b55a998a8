"""Text that is read while it is trained on: nothing is kept of it but the documents of two blocks.

An epoch reads every file once, in an order of its own, and cuts the documents into blocks. A block's documents are shuffled, its
chunks or packed rows are made and shuffled, too; the next block is read meanwhile. Blocks depend on seed and epoch alone, so a
position is where the current block begins and how many of its rows are used, and going on from it reads that block again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from flax_switch.config import DataConfig, check
from flax_switch.data import sources
from flax_switch.data.batches import Batch
from flax_switch.data.cache import Tokens, is_heldout
from flax_switch.data.loader import WORKER_DIED, BatchMaker, Parts, check_position, live_and_die_with_the_parent
from flax_switch.data.objectives import Mixture
from flax_switch.data.vocabulary import Vocabulary

_FILES, _DOCUMENTS, _ROWS = range(3)  # what is shuffled
_ENCODED_AT_ONCE = 1000
_WAIT = 0.2  # seconds after which one looks whether to stop

Position = list[int]  # epoch, file, document and block of a `Place`, and the rows used of the block that begins there


class Place(NamedTuple):
    """Where a block begins."""

    epoch: int = 0
    file: int = 0  # in the epoch's order
    document: int = 0  # in the file, held-out ones counted
    block: int = 0  # blocks before it, since the beginning of the run


class Block(NamedTuple):
    """Documents that are shuffled together."""

    place: Place
    text: Tokens
    following: Place


class _Stopped(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class TextStream:
    """The documents of files, again and again."""

    paths: Sequence[Path]
    config: DataConfig
    vocabulary: Vocabulary
    seed: int

    def blocks(self, place: Place, stopped: Callable[[], bool] = lambda: False) -> Iterator[Block]:
        """Yields the blocks from a place on, without end. Raises `ConfigError` where an epoch has no document to train on."""
        size = self.config.shuffle_buffer // 2
        found: list[str] = []
        while True:
            begin = place
            for file, document, text in self._documents(place):
                if stopped():
                    raise _Stopped
                found.append(text)
                if len(found) == size:
                    block = Block(
                        begin, self._shuffled(found, begin.block), Place(place.epoch, file, document + 1, begin.block + 1)
                    )
                    begin, found = block.following, []
                    yield block
            after = Place(place.epoch + 1, block=begin.block + bool(found))
            if found:
                block, found = Block(begin, self._shuffled(found, begin.block), after), []
                yield block
            whole = (place.file, place.document) == (0, 0)
            check(
                after.block > place.block or not whole,
                f"There is no document to train on in {self.paths[0]}{' and the other files' if len(self.paths) > 1 else ''}: all "
                "are blank or held out. Lower data.heldout_fraction, or name other files.",
            )
            place = after

    def _documents(self, place: Place) -> Iterator[tuple[int, int, str]]:
        """Yields (file, document, text) of what an epoch has from a place on for training."""
        order = self._order(len(self.paths), place.epoch, _FILES)
        for file in range(place.file, len(order)):
            begin = place.document if file == place.file else 0
            texts = sources.documents_of(self.paths[order[file]], self.config.text_field, self.config.document_separator)
            for document, text in enumerate(texts):
                if document >= begin and not is_heldout(text, self.config.heldout_fraction):
                    yield file, document, text

    def _shuffled(self, texts: list[str], block: int) -> Tokens:
        starts = range(0, len(texts), _ENCODED_AT_ONCE)
        ids = [one for i in starts for one in self.vocabulary.encode_documents(texts[i : i + _ENCODED_AT_ONCE])]
        return Tokens.of([ids[i] for i in self._order(len(ids), block, _DOCUMENTS)])

    def rows(self, block: int, count: int) -> Integer[np.ndarray, " count"]:
        """Returns the order in which a block's rows come."""
        return self._order(count, block, _ROWS)

    def _order(self, count: int, number: int, what: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed % 2**64, number, what]).permutation(count)


class _Rows(NamedTuple):
    """The rows of a block, and the order in which they come."""

    block: Block
    make: BatchMaker
    order: np.ndarray


class _Soon:
    """What a function returns, worked out in a thread of its own."""

    def __init__(self, function: Callable[[], Any]):
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._outcome = [function(), None]
        except BaseException as error:
            self._outcome = [None, error]

    def result(self) -> Any:
        """Waits for it; raises what the function raised."""
        self._thread.join()
        value, error = self._outcome
        if error is not None:
            raise error
        return value


class _Lane:
    """The rows of one stream in order, from a position on; one block is in use, the next is made meanwhile."""

    def __init__(self, stream: TextStream, mixture: Mixture, position: Position, stopped: Callable[[], bool]):
        self._stream, self._mixture = stream, mixture
        self._blocks = stream.blocks(Place(*position[:4]), stopped)
        self._next = _Soon(self._make)
        self._rows: _Rows | None = None
        self._place, self._used = Place(*position[:4]), position[4]

    @property
    def position(self) -> Position:
        """From which a lane continues as this one does."""
        return [*self._place, self._used]

    def take(self, count: int) -> Iterator[tuple[BatchMaker, np.ndarray, int]]:
        """Yields (maker, rows, number of the block) of the next rows, by block."""
        while count:
            rows = self._rows
            if rows is None:
                rows = self._rows = self._next.result()
                self._place, self._next = rows.block.place, _Soon(self._make)
            some = rows.order[self._used : self._used + count]
            if len(some):
                yield rows.make, some, rows.block.place.block
            count -= len(some)
            self._used += len(some)
            if self._used >= len(rows.order):
                self._place, self._used, self._rows = rows.block.following, 0, None

    def _make(self) -> _Rows:
        block = next(self._blocks)
        make = BatchMaker.of_text(block.text, self._mixture, self._stream.seed, whole=True)
        return _Rows(block, make, self._stream.rows(block.place.block, make.num_rows))


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Makes batches of streams whose rows take turns; what a thread or a process of its own runs."""

    streams: tuple[TextStream, ...]
    mixture: Mixture
    turns: Parts
    rows: np.ndarray  # which of a batch's rows are made here

    @classmethod
    def of(cls, streams: Sequence[TextStream], mixture: Mixture, turns: Parts, rows: np.ndarray | None) -> BatchReader:
        """Makes the given rows of each batch; None is all of them."""
        return cls(tuple(streams), mixture, turns, np.arange(mixture.config.batch_size) if rows is None else np.asarray(rows))

    def batches(
        self, first: int, positions: Sequence[Position], stopped: Callable[[], bool]
    ) -> Iterator[tuple[Batch, list[Position]]]:
        """Yields (batch, the positions after it) from batch `first` on."""
        lanes = [_Lane(stream, self.mixture, at, stopped) for stream, at in zip(self.streams, positions, strict=True)]
        size = self.mixture.config.batch_size
        for number in itertools.count(first):
            part, _ = self.turns(number * size + np.arange(size))
            parts, places = [], []
            for k, lane in enumerate(lanes):
                left = np.flatnonzero(part == k)
                for make, rows, block in lane.take(len(left)):
                    place, left = left[: len(rows)], left[len(rows) :]
                    wanted = np.isin(place, self.rows)
                    if wanted.any() or not (parts or len(self.rows)):
                        parts.append(make(rows[wanted], np.full(int(wanted.sum()), block)))
                        places.append(place[wanted])
                    del make  # and with it the block, before another one is read
            order = np.argsort(np.concatenate(places))
            order = order[np.searchsorted(np.sort(self.rows), self.rows)]
            batch = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
            yield batch, [lane.position for lane in lanes]


class StreamIterator:
    """Endless batches of streams, from `get_state()` of any earlier iterator on; as `loader.TrainIterator` is of a corpus."""

    def __init__(self, reader: BatchReader, *, fingerprint: str, num_workers: int):
        config = reader.mixture.config
        self._reader, self._num_workers, self._prefetch = reader, num_workers, config.prefetch
        same = {"batch_size": config.batch_size, "seed": config.seed, "shuffle": config.shuffle}
        self._identity = {**same, "fingerprint": fingerprint}
        self._next_batch, self._positions = 0, [[0] * 5 for _ in reader.streams]
        self._ahead: _Ahead | None = None

    def __iter__(self) -> StreamIterator:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            start = (self._next_batch, self._positions)
            self._ahead = _Ahead(self._reader, start, self._prefetch, in_process=self._num_workers > 0)
        batch, self._positions = self._ahead.get()
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns where the streams stand, as a JSON-able dict of some numbers; valid for any number of processes."""
        return {"next_batch": self._next_batch, "positions": self._positions, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `get_state` was called; reads at most a block of documents again.

        Raises `ConfigError` where the state is of another stream: other files, vocabulary, seed or batch size.
        """
        check_position(state, self._identity)
        self.close()
        self._next_batch, self._positions = int(state["next_batch"]), [list(map(int, at)) for at in state["positions"]]

    def close(self) -> None:
        """Stops reading."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Ahead:
    """What a reader makes, made ahead by a thread, or by a process, which leaves this one's thread to training."""

    def __init__(self, reader: BatchReader, start: tuple[int, list[Position]], most: int, in_process: bool):
        self._stop = threading.Event()
        self._worker: Any
        self._made: Any
        self._asked: Any
        if in_process:
            context = multiprocessing.get_context("spawn")
            self._made, self._asked = context.Queue(most), context.Queue()
            for one in (self._made, self._asked):
                one.cancel_join_thread()
            self._asked.put((reader, start))  # as an argument it would block the start of a process that dies before it reads it
            self._worker = context.Process(target=_work, args=(self._asked, self._made), daemon=True)
        else:
            self._made = queue.Queue(most)
            self._worker = threading.Thread(target=_fill, args=(reader, start, self._made, self._stop.is_set), daemon=True)
        self._worker.start()

    def get(self) -> tuple[Batch, list[Position]]:
        """Returns the next batch and the positions after it; raises what its maker raised."""
        while True:
            alive = self._worker.is_alive()
            try:
                made = self._made.get(timeout=_WAIT)
                break
            except queue.Empty:
                if not alive:
                    error = RuntimeError("The process that reads the stream has ended.")
                    error.add_note(WORKER_DIED)
                    raise error from None
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Ends the worker."""
        self._stop.set()
        if not isinstance(self._worker, threading.Thread):
            self._worker.terminate()
            self._asked.close()
            self._made.close()
        self._worker.join(timeout=10)


def _work(asked: Any, made: Any) -> None:
    """Fills a queue, in a process of its own."""
    live_and_die_with_the_parent()
    reader, start = asked.get()
    _fill(reader, start, made, lambda: False)


def _fill(reader: BatchReader, start: tuple[int, list[Position]], made: Any, stopped: Callable[[], bool]) -> None:
    """Puts into a queue what a reader makes, and at last what it raises."""

    def put(item: Any) -> None:
        while not stopped():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=_WAIT)
                return

    try:
        for item in reader.batches(*start, stopped):
            put(item)
            if stopped():
                return
    except _Stopped:
        pass
    except BaseException as error:
        put(error)
