"""Norms of states, in float32 inside: for the backward pass they keep what they are given, and compute the rest again."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_switch.ops.kept import keep_arguments


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, epsilon: float, dtype: Any) -> Float[Array, "*B D"]:
    """Returns T5's norm: no mean, no bias (1910.07467)."""

    def norm(x: Array, scale: Array) -> Array:
        x = x.astype(jnp.float32)
        return (_with_unit_mean_square(x, epsilon) * _along_last(scale, x)).astype(dtype)

    return keep_arguments(norm, x, scale)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, epsilon: float, dtype: Any
) -> Float[Array, "*B D"]:
    """Returns the norm of 1607.06450, which takes the mean off and adds a bias."""

    def norm(x: Array, scale: Array, bias: Array) -> Array:
        x = x.astype(jnp.float32)
        x -= x.mean(-1, keepdims=True)
        return (_with_unit_mean_square(x, epsilon) * _along_last(scale, x) + _along_last(bias, x)).astype(dtype)

    return keep_arguments(norm, x, scale, bias)


def _with_unit_mean_square(x: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def _along_last(x: Array, y: Array) -> Array:
    """Returns a vector in float32 with as many axes as `y` has, to go with its last one."""
    return x.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
