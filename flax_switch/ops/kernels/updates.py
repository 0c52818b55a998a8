"""An update that is made or left out, as a number on the device says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from flax_switch.ops.kernels import platforms


def update_if(
    condition: Bool[Array, ""], update: Callable[..., Any], old: Any, *args: Any, implementation: str | None = None
) -> Any:
    """Returns the tree `update(old, *args)` where the condition holds, and else `old`; no host waits for the condition.

    implementation: one of IMPLEMENTATIONS; by default DEFAULT's for the platform.
    """
    bound = {name: lambda *operands, run=run: run(update, *operands) for name, run in IMPLEMENTATIONS.items()}
    return platforms.run(bound, DEFAULT, implementation, condition, old, *args)


def _branch(update: Callable[..., Any], condition: Bool[Array, ""], old: Any, *args: Any) -> Any:
    """Updates in a branch, after the backward pass has read the parameters, so that XLA can write over them without a copy."""
    return jax.lax.cond(condition, update, lambda old, *_: old, old, *args)


def _select(update: Callable[..., Any], condition: Bool[Array, ""], old: Any, *args: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), update(old, *args), old)


IMPLEMENTATIONS = {"reference": _select, "branch": _branch}
# XLA's branches on a GPU let the host read the condition; on a TPU what they return is copied, and parameters held three times.
DEFAULT = {"cuda": "reference", "tpu": "reference", "other": "branch"}
