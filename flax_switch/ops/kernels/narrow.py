"""Kernels of 16 bits that are widened where they are multiplied, and not before."""

from collections.abc import Callable
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Narrow:
    """A kernel in bfloat16 or float16, for programs that must not take much memory.

    A CPU computes its products in float32. XLA would convert all kernels of a program when it begins, and hold them to its end:
    three times their memory for some speed.
    """

    values: Float[Array, "D F"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """The kernel's dtype."""
        return np.dtype(self.values.dtype)

    def astype(self, dtype: DTypeLike) -> Self:
        """Returns it as it is: products have the dtype of their rows."""
        return self

    def multiplied(self, x: Array, product: Callable[[Array, Array], Array]) -> Array:
        """Returns `product(x, kernel)`, computed in a loop of one round, out of which XLA moves nothing.

        The number of rounds must not be known when the program is compiled, and so is read off `x`: where that is no number there
        are two, with the same result.
        """
        made = jax.eval_shape(product, x, self.values)

        def body(carry: tuple[Int[Array, ""], Array]) -> tuple[Int[Array, ""], Array]:
            values, number = lax.optimization_barrier((self.values, carry[0]))
            return number + 1, product(x, values)

        rounds = 1 + jnp.isnan(x.reshape(-1)[0]).astype(jnp.int32)
        return lax.while_loop(lambda carry: carry[0] < rounds, body, (jnp.int32(0), jnp.zeros(made.shape, made.dtype)))[1]
