"""What a person sees while a run goes on: a progress bar on a terminal, a line now and then elsewhere."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# On a terminal lines wrap at words; in a file they stay whole. Brackets in text are brackets.
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), markup=False)


_RATES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


class TrainProgress:
    """Shows step, loss, tokens/s, FLOP/s, time left and the share of time spent waiting for data.

    flops: of a step, by the model's config; peak: FLOP/s of all devices together, where it is known. Then what the model uses of it
    (MFU) is shown, too.
    """

    def __init__(self, start: int, steps: int, flops: float = 0.0, peak: float | None = None):
        self._steps, self._flops, self._peak = steps, flops, peak
        self._bar = None
        if console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task("training", total=steps, completed=start, status="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows the metrics of a logged step."""
        loss = f"loss {metrics['loss']:.3f}"
        status = (
            f"{loss}  {metrics['tokens_per_second']:,.0f} tokens/s{self._speed(metrics['seconds_per_step'])}  "
            f"data wait {100 * metrics['data_wait_fraction']:.1f} %"
        ) + (f"  {metrics['skipped_steps']} skipped" if metrics.get("skipped_steps") else "")
        left = (self._steps - step) * metrics["seconds_per_step"]
        console.print(f"step {step}/{self._steps}  {status}  {duration(left)} of steps left")  # above the bar, where it stays
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=loss)

    def _speed(self, seconds: float) -> str:
        """Returns FLOP/s and, where the devices' peak is known, the share of it."""
        rate = self._flops / max(seconds, 1e-9)
        if not rate:
            return ""
        unit, name = next((pair for pair in _RATES if rate >= pair[0]), _RATES[-1])
        share = f"  {100 * rate / self._peak:.1f} % MFU" if self._peak else ""
        return f"  {rate / unit:.3g} {name}FLOP/s{share}"

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        console.print(text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Returns seconds as '2 h 05 min', '3 min 20 s' or '12 s'."""
    seconds = int(seconds + 0.5)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into `stopped`, so that the loop can save and leave; a second Ctrl-C interrupts.

    With several processes a signal to any of them stops all after the same step: JAX takes SIGTERM and agrees on one.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        self._asked: str | None = None
        self._several = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number).name
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self, step: int) -> None:
        """Sets `stopped` where the run is to stop after this step; call it once a step, in every process."""
        if not self._several:
            self.stopped = self._asked
        elif multihost_utils.reached_preemption_sync_point(step):
            self.stopped = self._asked or "A signal to one of the processes"

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Stopwatch:
    """Time per step and the part of it spent waiting for data, since the last `read`."""

    def __init__(self) -> None:
        self._start, self._waited, self._steps, self._tokens = time.perf_counter(), 0.0, 0, 0

    def pause(self, pending: Any) -> float:
        """Returns the moment when `pending` is computed; `resume` leaves out what passes from then on (evaluation, say)."""
        jax.block_until_ready(pending)
        return time.perf_counter()

    def resume(self, since: float) -> None:
        """Takes the time since `pause` out."""
        self._start += time.perf_counter() - since

    def count(self, waited: float, tokens: float) -> None:
        """Counts a step that waited so many seconds for data."""
        self._waited += waited
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Returns the rates since the last reading."""
        elapsed = time.perf_counter() - self._start
        rates = {
            "seconds_per_step": elapsed / max(self._steps, 1),
            "tokens_per_second": self._tokens / max(elapsed, 1e-9),
            "data_wait_fraction": self._waited / max(elapsed, 1e-9),
        }
        self.__init__()
        return rates
