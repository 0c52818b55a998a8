"""Keeps a loop of large operations from becoming one function."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


def apart(count: Int32[Array, ""]) -> Int32[Array, ""]:
    """Returns a loop's count, which is not negative, as it is; its loop's operations are compiled apart, for all threads.

    From jaxlib 0.12 on XLA takes a loop for small, whatever it reads, if all in it is its own code, and makes one function for one
    thread of it: twelve layers of int8 took 35 seconds to compile. No loop that sorts is taken for small; on a CPU this one does.
    """
    return lax.platform_dependent(count, cpu=_by_sorting, default=lambda count: count)


def _by_sorting(count: Array) -> Array:
    return lax.sort(jnp.stack([jnp.zeros_like(count), count]))[1]
