"""Lets XLA update parameters in place."""

from typing import Any

import jax
import jax.numpy as jnp


def updates_after(norm: jax.Array, updates: Any) -> Any:
    """Returns the updates, which on a CPU are not computed before `norm`, that of all gradients; all NaN there if the norm is NaN.

    A parameter can be updated in place once the backward pass has read it. XLA's CPU compiler sees that only where the update
    cannot come earlier, and else copies the parameters in every step. Training ends in any case where a loss is not finite.
    """
    one = jax.lax.platform_dependent(
        norm, cpu=lambda norm: jnp.where(norm >= 0, jnp.ones_like(norm), norm), default=lambda norm: jnp.ones_like(norm)
    )
    return jax.tree.map(lambda update: update * one.astype(update.dtype), updates)
