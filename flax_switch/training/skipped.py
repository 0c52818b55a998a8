"""Updates that are no numbers: the step skips them, here they are counted, and too many in a row end the run."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_switch.config import ConfigError


class NotFiniteError(ConfigError, FloatingPointError):
    """Training came to numbers that are none, and another setting is needed."""


class Skipped:
    """Counts skipped updates. What the device says of a step is read when metrics are logged, and no step waits for it."""

    def __init__(self, most: int) -> None:
        """most: in a row, after which `check` raises."""
        self._most, self._unread = most, []
        self._total = self._in_a_row = 0

    def add(self, metrics: dict[str, Any]) -> None:
        """Takes the metrics of the next step."""
        if "skipped" in metrics:
            self._unread.append(metrics["skipped"])

    def read(self) -> dict[str, int]:
        """Returns how many updates were skipped so far, where any was."""
        for skipped in jax.device_get(self._unread):
            self._total += int(skipped)
            self._in_a_row = self._in_a_row + 1 if skipped else 0
            if self._in_a_row >= self._most:
                break  # that the next one was fine does not help
        self._unread = []
        return {"skipped_steps": self._total} if self._total else {}

    def check(self, step: int, saved: int | None) -> None:
        """Raises `NotFiniteError` after too many in a row. saved: the step of the last checkpoint."""
        if self._in_a_row < self._most:
            return
        kept = "No checkpoint is there yet" if saved is None else f"The checkpoint of step {saved} is kept; its numbers are finite"
        raise NotFiniteError(
            f"Up to step {step} {self._in_a_row} updates in a row had a loss or gradients that are no numbers, and were skipped. "
            f"{kept}. Run the same command with a lower optimizer.learning_rate, which a run may change when it goes on; or start "
            "another with more optimizer.warmup_steps, with optimizer.clip_global_norm, or in bfloat16 with "
            "model.router_dtype='float32'. Raise train.max_nonfinite_steps to wait longer."
        )


def all_finite(params: Any) -> bool:
    """Says whether every parameter is a number; on all processes alike."""
    return bool(_all_finite(params))


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
