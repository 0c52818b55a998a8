"""Experts that lie in files: a bounded memory of those that were hit last and most often, and threads that read ahead.

What goes is the least frequently used, with ageing (LFU-DA). An expert's priority is how often it was hit, plus the memory's age at
its last hit; the lowest goes, of equals the one that was hit longest ago. The age is the priority of the last one that went: so an
expert that was hit often, but no longer is, goes in the end. Experts that the layer at work will still come to stay.

Read ahead are the next experts of the layer at work, which are known, and a guess: the experts of the next sparse layer that mostly
followed those being hit now. While more than one read in twenty was for nothing, nothing is guessed.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flax_switch.config import check
from flax_switch.host.memory import return_freed_memory

Key = tuple[str, int]  # a layer, such as "decoder/layers_3", and the number of an expert in it
Arrays = Mapping[str, np.ndarray]

READERS = 4  # threads, and so many experts are read ahead at a time
WINDOW = 16  # experts of the layer at work that are looked at for reading ahead
FEW = 64  # hits of one layer times hits of the next, up to which it is noted which follow which
FOLLOWERS = 16  # of an expert that are counted; of more, the half that followed most often stays
LEAST_SEEN = 3  # hits of an expert before anything is guessed from it
FOR_NOTHING = 0.05  # share of reads
COMPILED = 1.0  # seconds: a program that reads its first expert later was compiled before, and that takes memory

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class ExpertReads:
    """What became of the experts that rows hit; an expert counts once for each time that a layer came to it."""

    hits: int = 0  # were in memory, from an earlier hit
    misses: int = 0  # were not, and had to be read, in time or not
    unused: int = 0  # were read ahead, and went before any row hit them
    bytes_read: int = 0
    seconds_waited: float = 0.0  # for files

    @property
    def hit_rate(self) -> float:
        """The share of hits; 0 where nothing was hit yet."""
        return self.hits / max(self.hits + self.misses, 1)

    def __sub__(self, before: ExpertReads) -> ExpertReads:
        """Returns what happened since."""
        return ExpertReads(*(getattr(self, f.name) - getattr(before, f.name) for f in dataclasses.fields(self)))

    def __str__(self) -> str:
        return (
            f"Experts from disk: of {self.hits + self.misses:,} hits {100 * self.hit_rate:.1f} % were in memory; {self.misses:,} "
            f"experts were read, {self.unused:,} more for nothing, {self.bytes_read / 1e6:,.1f} MB in all; waiting for them took "
            f"{self.seconds_waited:.2f} s."
        )


class ExpertCache:
    """The experts of a model in a bounded memory. Several threads may ask at a time.

    parts: by layer, shape and dtype of each array of its experts, [E, ...]. read: returns an expert's arrays, without the axis E,
    and how many bytes it took from files. budget: bytes of all arrays, those being read included.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, tuple[tuple[int, ...], np.dtype]]],
        read: Callable[[str, int], tuple[Arrays, int]],
        budget: int,
    ) -> None:
        self.number = next(_numbers)
        self.parts = parts
        self.failure: Exception | None = None  # why an expert could not be read, for whoever runs the program
        self._programs = 0  # at work
        self._begun = math.inf  # when the first of them was started; infinity once it has read an expert
        self._read, self._budget = read, budget
        return_freed_memory()
        self._sizes = {layer: sum(math.prod(s[1:]) * d.itemsize for s, d in arrays.values()) for layer, arrays in parts.items()}
        largest = max(self._sizes.values(), default=0)
        check(
            largest <= budget,
            f"expert_memory must hold an expert, which takes {largest:,} bytes; it is {budget:,}. Give more, or quantise it.",
        )
        self._lock = threading.Lock()
        self._held: dict[Key, Arrays] = {}  # the one that was hit last comes last
        self._priority: dict[Key, int] = {}  # of each that is held
        self._coming_in: dict[Key, Future[Arrays]] = {}  # being read
        self._not_hit: set[Key] = set()  # read ahead, or being so, and not hit yet
        self._taken = 0  # bytes held and being read
        self._age = 0
        self._frequency: Counter[Key] = Counter()
        self._pass: tuple[str, list[int]] = ("", [])  # the layer at work, and its experts that are hit
        self._followers: dict[Key, Counter[Key]] = {}  # how often which experts were hit in the next layer
        self._counts: dict[str, float] = dict.fromkeys((field.name for field in dataclasses.fields(ExpertReads)), 0)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def reads(self) -> ExpertReads:
        """What was hit and read so far."""
        with self._lock:
            return ExpertReads(**self._counts)  # pyright: ignore[reportArgumentType]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keeps a failure until no program that may meet it is at work any more."""
        with self._lock:
            if self._programs == 0:
                self.failure, self._begun = None, time.perf_counter()
            self._programs += 1
        try:
            yield
        finally:
            with self._lock:
                self._programs -= 1

    def expert_bytes(self, layer: str) -> int:
        """Returns what an expert of a layer takes in memory."""
        return self._sizes[layer]

    def clear(self) -> None:
        """Drops the experts that are held."""
        with self._lock:
            for key in list(self._held):
                self._drop(key)

    def get(self, layer: str, expert: int, rows: np.ndarray) -> Arrays:
        """Returns an expert's arrays, from memory or when they are read. Raises what `read` raises.

        rows: how many rows hit each of the layer's experts. Those that are hit are asked for one after the other, by number.
        """
        key = (layer, expert)
        with self._lock:
            coming = self._coming(layer, expert, rows)
            arrays, future = self._held.get(key), self._coming_in.get(key)
            read_here = arrays is None and future is None
            if read_here:
                future = self._reserve(key, coming)
            self._count(key)
            self._read_ahead(layer, coming)
        if arrays is not None:
            return arrays
        assert future is not None
        started = time.perf_counter()
        if read_here:
            self._load(key, future)
        try:
            return future.result()
        finally:
            with self._lock:
                self._counts["seconds_waited"] += time.perf_counter() - started

    def _coming(self, layer: str, expert: int, rows: np.ndarray) -> Sequence[int]:
        """Returns the experts that the layer at work will come to after this one; notes where one begins."""
        if self._pass[0] != layer or int(np.argmax(rows > 0)) == expert:
            hit = np.flatnonzero(rows).tolist()
            before, seen = self._pass
            if before and len(seen) * len(hit) <= FEW:
                for e in seen:
                    followers = self._followers.setdefault((before, e), Counter())
                    followers.update((layer, f) for f in hit)
                    if len(followers) > FOLLOWERS:
                        self._followers[before, e] = Counter(dict(followers.most_common(FOLLOWERS // 2)))
            self._pass = (layer, hit)
        hit = self._pass[1]
        return hit[bisect.bisect_right(hit, expert) :]

    def _count(self, key: Key) -> None:
        """Counts a hit."""
        self._frequency[key] += 1
        if key in self._held:
            self._held[key] = self._held.pop(key)
            self._priority[key] = self._age + self._frequency[key]
            if key not in self._not_hit:
                self._counts["hits"] += 1
                return
        self._not_hit.discard(key)
        self._counts["misses"] += 1

    def _read_ahead(self, layer: str, coming: Sequence[int]) -> None:
        """Has threads read what will be hit and, if they have nothing of the kind to do, what may be."""
        for key in ((layer, e) for e in coming[:WINDOW]):
            if not self._start(key, coming):
                return
        if not coming:
            for key in self._guesses():
                if len(self._not_hit) + self._counts["unused"] >= FOR_NOTHING * self._counts["misses"] or not self._start(
                    key, coming
                ):
                    return

    def _guesses(self) -> Iterable[Key]:
        """Returns the experts that followed one that is hit now more often than not."""
        layer, hit = self._pass
        for key in ((layer, e) for e in hit[:WINDOW]):
            seen = self._frequency[key] - 1  # without this time, whose followers are yet to come
            if seen >= LEAST_SEEN:
                yield from (f for f, times in self._followers.get(key, Counter()).items() if 2 * times > seen)

    def _start(self, key: Key, coming: Sequence[int]) -> bool:
        """Has a thread read an expert, unless it is there or coming in; returns False where no more can be read ahead now.

        Half of the memory is kept for what is asked for.
        """
        if key in self._held or key in self._coming_in:
            return True
        size = self._sizes[key[0]]
        reading = sum(self._sizes[layer] for layer, _ in self._coming_in)
        if len(self._coming_in) >= READERS or 2 * (reading + size) > self._budget:
            return False
        future = self._reserve(key, coming, ahead=True)
        if future is None:
            return False
        self._not_hit.add(key)
        self._pool = self._pool or ThreadPoolExecutor(READERS, "experts")
        self._pool.submit(self._load, key, future)
        return True

    def _reserve(self, key: Key, coming: Sequence[int], *, ahead: bool = False) -> Future[Arrays] | None:
        """Makes room for an expert; None where it is `ahead` of its time and only what will be hit sooner could go."""
        size, future = self._sizes[key[0]], Future()
        while self._taken + size > self._budget and self._held:
            kept = {(self._pass[0], e) for e in coming} | (self._not_hit if ahead else set())
            open_ones = [k for k in self._held if k not in kept]
            if not open_ones and ahead:
                return None
            self._drop(min(open_ones or self._held, key=self._priority.__getitem__))
        self._taken += size
        self._coming_in[key] = future
        return future

    def _drop(self, key: Key) -> None:
        del self._held[key]
        self._age = self._priority.pop(key)
        self._taken -= self._sizes[key[0]]
        if key in self._not_hit:
            self._not_hit.remove(key)
            self._counts["unused"] += 1

    def _load(self, key: Key, future: Future[Arrays]) -> None:
        """Reads an expert that there is room for."""
        waited, self._begun = time.perf_counter() - self._begun, math.inf
        if waited > COMPILED:
            return_freed_memory()
        try:
            arrays, size = self._read(*key)
        except Exception as error:
            with self._lock:
                del self._coming_in[key]
                self._taken -= self._sizes[key[0]]
                self._not_hit.discard(key)
            future.set_exception(error)
            return
        with self._lock:
            del self._coming_in[key]
            self._held[key] = arrays
            self._priority[key] = self._age + self._frequency[key]
            self._counts["bytes_read"] += size
        future.set_result(arrays)
