"""Updates of parameters that lie where they are."""

from typing import Any

import jax
import jax.numpy as jnp


def updates_after(norm: jax.Array, updates: Any) -> Any:
    """The updates, on a processor not before all gradients are there, whose norm this is; all NaN there if the norm is NaN.

    A parameter can be updated where it lies once the backward pass has read it. XLA for processors sees that only if the update
    cannot come earlier, and else copies the parameters in every step. The loop ends a run whose loss is not finite in any case.
    """
    one = jax.lax.platform_dependent(
        norm, cpu=lambda norm: jnp.where(norm >= 0, jnp.ones_like(norm), norm), default=lambda norm: jnp.ones_like(norm)
    )
    return jax.tree.map(lambda update: update * one.astype(update.dtype), updates)
