"""The engine: one thread that owns the device, admits waiting sequences to slots and decodes, step after step.

It knows nothing of HTTP. A `Job` is what one request asks for, a `Sequence` a row of it; what is new of a sequence is told by
`Engine.deliver`, in the engine's thread.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flax_switch.generation.slots import Report, Row, Scores, SlotDecoder, level_of
from flax_switch.serving.limits import Limits

log = logging.getLogger(__name__)

RUN_SECONDS = 0.03  # of decoding between two looks at who waits: what a newcomer waits and a stream pauses
UNWATCHED_SECONDS = 0.1  # the same where nobody follows a text
LEAST_STEPS = 8  # of a run that ends when a row has all its tokens, so that the row's slot is not empty for long


class Full(Exception):
    """The queue holds all that it may."""


class Closing(Exception):
    """The engine takes no more work."""


@dataclasses.dataclass(eq=False)
class Sequence:
    """A row that is wanted, and how far it is."""

    row: Row
    scored: bool = False  # whether its log-probabilities are wanted
    followed: bool = True  # whether somebody looks at it before its end
    job: Job = dataclasses.field(init=False)
    tokens: list[int] = dataclasses.field(default_factory=list)  # EOS included
    scores: Scores | None = None
    finished: bool = False
    cancelled: bool = False  # nobody waits for it any more
    error: str | None = None  # why it will never finish


@dataclasses.dataclass(eq=False)
class Job:
    """The sequences of one request; `started` when the first has a slot."""

    sequences: list[Sequence]
    started: bool = False

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            sequence.job = self


class Pool:
    """The slots for sources of one length in one model."""

    def __init__(self, decoder: SlotDecoder, length: int, limits: Limits):
        self.decoder, self.length, self.limits = decoder, length, limits
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: dict[int, Sequence] = {}  # by slot
        self.step_seconds = dict.fromkeys(limits.sizes, RUN_SECONDS)
        self.slots = decoder.empty(limits.slots, length)

    def warm_up(self) -> None:
        """Compiles every program that requests can need."""
        for batch in self.limits.batches:
            self.slots = self.decoder.admit(self.slots, {}, batch)
        for size in self.limits.sizes:
            self.slots, report = self.decoder.run(self.slots, np.zeros(size, bool), 1, 0, False)
            jax.device_get(report)

    def take(self) -> dict[int, Sequence]:
        """Gives free slots, the first ones, to those that have waited longest: as many as are encoded together."""
        free = (slot for slot in range(self.limits.slots) if slot not in self.running)
        taken: dict[int, Sequence] = {}
        while self.waiting and len(taken) < self.limits.batches[-1] and (slot := next(free, None)) is not None:
            taken[slot] = self.waiting.popleft()
            taken[slot].job.started = True
        self.running |= taken
        return taken

    def admit(self, taken: Mapping[int, Sequence]) -> None:
        """Encodes the sources of those that have new slots."""
        batch = next(batch for batch in self.limits.batches if batch >= len(taken))
        self.slots = self.decoder.admit(self.slots, {slot: sequence.row for slot, sequence in taken.items()}, batch)

    def run(self) -> list[Sequence]:
        """Decodes for a while; returns the sequences that have something to tell."""
        self.running = {slot: sequence for slot, sequence in self.running.items() if not sequence.cancelled}
        if not self.running:
            return []
        size = next(size for size in self.limits.sizes if size > max(self.running))
        active = np.array([slot in self.running for slot in range(size)])
        sequences = self.running.values()
        level = max(level_of(sequence.row.controls) for sequence in sequences)
        scored = any(sequence.scored for sequence in sequences)
        left = min(sequence.row.controls.max_new_tokens - len(sequence.tokens) for sequence in sequences)
        seconds = RUN_SECONDS if any(sequence.followed for sequence in sequences) else UNWATCHED_SECONDS
        most = max(1, min(int(seconds / self.step_seconds[size]), max(left, LEAST_STEPS)))
        started = time.perf_counter()
        self.slots, report = self.decoder.run(self.slots, active, most, level, scored, bool(self.waiting))
        scores, report = report.scores if scored else None, jax.device_get(report._replace(scores=None))
        passed = (time.perf_counter() - started) / max(int(report.steps), 1)
        self.step_seconds[size] = 0.7 * self.step_seconds[size] + 0.3 * passed
        return self._noted(report, None if scores is None else jax.device_get(scores))

    def _noted(self, report: Report, scores: Scores | None) -> list[Sequence]:
        told = list(self.running.items())
        for slot, sequence in told:
            length = int(report.lengths[slot])
            sequence.tokens = report.tokens[slot, :length].tolist()
            if scores is not None and sequence.scored:
                sequence.scores = jax.tree.map(lambda x, slot=slot, length=length: x[slot, :length], scores)
            if report.finished[slot]:
                sequence.finished = True
                del self.running[slot]
        return [sequence for _, sequence in told if sequence.followed or sequence.finished]


class Engine(threading.Thread):
    """The thread that decodes. Other threads call `submit`, `cancel`, `call`, `drain` and `stop`."""

    def __init__(self, decoders: Mapping[str, SlotDecoder], limits: Limits):
        """Allocates the slots of all models, by name; `warm_up` compiles their programs."""
        super().__init__(name="flax-switch engine", daemon=True)
        self.limits = limits
        self.pools = {
            (name, length): Pool(decoder, length, limits) for name, decoder in decoders.items() for length in limits.buckets
        }
        self.deliver: Callable[[list[Sequence]], None] = lambda sequences: None
        self._calls: collections.deque[tuple[concurrent.futures.Future, Callable[[], Any]]] = collections.deque()
        self._changed = threading.Condition()
        self.draining = self._stopping = False

    def warm_up(self) -> None:
        """Compiles every program, before there is a request."""
        for pool in self.pools.values():
            pool.warm_up()

    @property
    def waiting(self) -> int:
        """How many sequences wait for a slot."""
        return sum(len(pool.waiting) for pool in self.pools.values())

    @property
    def running(self) -> int:
        """How many sequences have one."""
        return sum(len(pool.running) for pool in self.pools.values())

    def submit(self, model: str, job: Job) -> None:
        """Has a job's sequences wait for slots; raises `Full` or `Closing`, and takes none of them then."""
        with self._changed:
            self._check_open(len(job.sequences))
            for sequence in job.sequences:
                self.pools[model, self.limits.bucket(len(sequence.row.ids))].waiting.append(sequence)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Has the engine's thread call a function between two steps; raises `Full` or `Closing`."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            self._check_open(1)
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def _check_open(self, more: int) -> None:
        if self.draining:
            raise Closing
        if self.waiting + len(self._calls) + more > self.limits.queue + self.limits.slots - min(self.running, self.limits.slots):
            raise Full

    def cancel(self, job: Job) -> None:
        """Frees what a job has, at the next step."""
        with self._changed:
            for sequence in job.sequences:
                sequence.cancelled = True
            for pool in self.pools.values():
                pool.waiting = collections.deque(sequence for sequence in pool.waiting if sequence.job is not job)
            self._changed.notify()

    def drain(self) -> None:
        """Takes no more work and refuses what waits; jobs of which a part has started go on."""
        with self._changed:
            self.draining, refused = True, []
            for pool in self.pools.values():
                refused += [sequence for sequence in pool.waiting if not sequence.job.started]
                pool.waiting = collections.deque(sequence for sequence in pool.waiting if sequence.job.started)
            for future, _ in self._calls:
                future.set_exception(Closing())
            self._calls.clear()
        for sequence in refused:
            sequence.error = "closing"
        self.deliver(refused)

    def stop(self) -> None:
        """Ends the thread when nothing runs any more."""
        self.drain()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """Admits, decodes and delivers until it is stopped."""
        while True:
            with self._changed:
                while not (self.waiting or self.running or self._calls):
                    if self._stopping:
                        return
                    self._changed.wait()
                calls, self._calls = self._calls, collections.deque()
            for future, function in calls:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
            for pool in self.pools.values():
                if pool.waiting or pool.running:
                    self._decode(pool)

    def _decode(self, pool: Pool) -> None:
        """Decodes for a while in one pool; where that fails, its sequences are told and its slots begin anew."""
        try:
            busy = bool(pool.running)
            while True:
                with self._changed:
                    taken = pool.take()
                if taken:
                    pool.admit(taken)
                if busy or not taken:  # those at work have waited for one batch
                    break
            self.deliver(pool.run())
        except Exception:
            log.exception("Decoding failed; the sequences in these slots are given up.")
            failed, pool.running = list(pool.running.values()), {}
            for sequence in failed:
                sequence.error = "failed"
            pool.slots = pool.decoder.empty(pool.limits.slots, pool.length)
            self.deliver(failed)
