"""Notices a step of several processes that does not end, says who is missing, and ends this process as one that lost another.

JAX's coordination service misses a process that is gone, but not one that lives and waits for something else than the others, or
whose devices send nothing any more. So every process notes each second, in that service, which step it has begun.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax

from flax_switch.host.json_text import json_object
from flax_switch.parallel import processes

_KEY = "flax_switch/steps/"
_BEAT = 1.0  # seconds
_PATIENCE = 20  # seconds in which the service must answer


class Watchdog:
    """Watches the steps of a loop, but for the first, which compiles. Without a limit, and in one process, nothing is watched."""

    def __init__(self, limit: float | None, start: int):
        """limit: seconds that a step may take, the wait for others included. start: the number of steps that were made before."""
        self._limit = limit if jax.process_count() > 1 else None
        self._first, self._begun, self._ended = start + 1, start, start  # numbers of steps
        self._since, self._beats = time.monotonic(), 0
        self._pending: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        if self._limit is not None:
            for work in (self._finish, self._watch):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._pending.put(None)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Counts the block as the beginning of a step, whose end is when what the yielded function is given has been computed.

        Steps may begin before the former ones have ended.
        """
        if self._limit is None:
            yield lambda result: None
        elif number == self._first:
            yield lambda result: None
            self._begun = self._ended = number
        else:
            if self._begun == self._ended:
                self._since = time.monotonic()
            self._begun = number
            yield lambda result: self._pending.put((number, result))

    def _finish(self) -> None:
        while (pending := self._pending.get()) is not None:
            number, result = pending
            with contextlib.suppress(Exception):  # the loop raises it, too
                jax.block_until_ready(result)
                self._ended, self._since = number, time.monotonic()

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._closed.wait(_BEAT):
            self._beats += 1
            with contextlib.suppress(Exception):  # a service that is gone is for another thread to notice
                processes.note(f"{_KEY}{jax.process_index()}", json.dumps({"begun": self._begun, "beats": self._beats}))
            waited = time.monotonic() - self._since
            if self._begun > self._ended and waited > self._limit:
                self._end_unless_over(
                    self._ended + 1,
                    f"Process {jax.process_index()} has waited {waited:.0f} s for step {self._ended + 1} to end, longer than "
                    f"train.step_timeout={self._limit:g} s",
                )

    def _end_unless_over(self, step: int, said: str) -> None:
        """Ends the process and says who is missing, unless the step ends in the moments that it takes to find out."""
        timer = processes.exit_within(_PATIENCE, processes.LOST_ANOTHER)  # the service need not answer
        before = _noted()
        time.sleep(3 * _BEAT)
        others = [(process, before[process], now) for process, now in enumerate(_noted()) if process != jax.process_index()]
        if self._ended >= step or self._closed.is_set():
            timer.cancel()
            return
        late = [f"process {process} has not begun it" for process, _, now in others if now.get("begun", 0) < step]
        silent = [f"process {process} gives no sign of life" for process, then, now in others if now == then]
        processes.end_as_lost(f"{said}: {'; '.join([*late, *silent]) or 'all have begun it'}.")


def _noted() -> list[dict[str, Any]]:
    """Returns what each process has noted, in order; nothing of one that has noted nothing yet."""
    found = processes.noted(_KEY)
    texts = [found.get(str(process), "{}") for process in range(jax.process_count())]
    return [json_object(text, "a process's step") for text in texts]
