"""Multiplies rows by a kernel as ever, and has the gradient of an array beside it say which rows came by.

For y = x K the sum of g^2 x^T x over rows, g being the loss's gradient by a row of y, tells what an error in K costs (the diagonal
blocks of 1503.05671, with one number for a row's outputs). No product says it; but the gradient of x Z by Z is x^T times the
gradient of x Z, and a backward pass may give that product any gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_switch.ops.kernels.adapted import Adapted


@flax.struct.dataclass
class Observed(Adapted):
    """A kernel, or a stack of them, whose `a`, zeros [..., D, D], has the rows' weighted second moments for its gradient.

    A row that no loss depends on counts nothing: padding, a buffer's empty slots, tokens that no expert took.
    """

    b: Any = None

    def astype(self, dtype: DTypeLike) -> Self:
        """Returns it with the kernel in a dtype; moments stay in float32."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def multiplied(self, x: Array, product: Callable[[Array, Any], Array]) -> Array:
        """Returns `product(x, kernel)`."""
        rows = x.astype(jnp.float32)
        return _observed(product(x, self.base), product(rows, self.a), rows)


@jax.custom_vjp
def _observed(y: Float[Array, "*B F"], z: Float[Array, "*B D"], x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    return y


def _forward(y, z, x):
    return y, x


def _backward(x, gradient):
    weight = jnp.square(gradient.astype(jnp.float32)).sum(-1, keepdims=True)
    return gradient, weight * x, jnp.zeros_like(x)


_observed.defvjp(_forward, _backward)
