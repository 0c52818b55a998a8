"""A trace of a few steps by jax.profiler, for xprof or Perfetto."""

import jax
from etils import epath

from flax_switch.training.progress import console

WARM_UP = 2  # steps before the trace: the first compiles, the second may allocate


class Profile:
    """Traces `steps` steps of a run into `workdir/profile`; with 0 steps it does nothing."""

    def __init__(self, workdir: epath.PathLike, start: int, steps: int) -> None:
        self._folder, self._first, self._last = epath.Path(workdir) / "profile", start + WARM_UP, start + WARM_UP + steps
        self._wanted, self._on = steps > 0, False

    def before(self, step: int) -> None:
        """Starts the trace where the step after `step` is the first of it."""
        if self._wanted and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, metrics: object) -> None:
        """Ends the trace where `step` was the last of it; `metrics` are waited for, so that the trace holds the step's work."""
        if self._on and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is on, and says where it lies."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = self._wanted = False
            console.print(f"Profile: {self._folder}")
