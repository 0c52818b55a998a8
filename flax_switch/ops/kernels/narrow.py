"""Kernels of 16 bits that are multiplied as they are, or widened where they are multiplied and not before.

reference   the kernel widened, and the product
parts       few rows by a kernel in bfloat16: a float32 number is the sum of three in bfloat16, so that a product of three times the
            rows has every bit that counts, and the kernel is read once, in half the bytes. For CPUs
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int

from flax_switch.ops.kernels import platforms

MOST_DECODED = 2  # rows that a program decodes, up to which products of parts are about as fast as those of float32
MOST_MULTIPLIED = 4  # rows of one of its products, with two experts a row; more are faster with the kernel widened
LEAST_WEIGHTS = 2**19  # of a kernel; in float32 smaller ones lie in a CPU's cache, and are faster


@flax.struct.dataclass
class Narrow:
    """A kernel in bfloat16 or float16, for programs that must not take much memory.

    A CPU computes its products in float32. XLA would convert all kernels of a program when it begins, and hold them to its end:
    three times their memory for some speed.

    few: whether it belongs to a program that decodes no more than MOST_DECODED rows. It is no matter of a product alone: with
      experts on disk and in memory the same products must be made in the same way.
    """

    values: Float[Array, "*E D F"]
    few: bool = flax.struct.field(pytree_node=False, default=False)

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

    def __getitem__(self, index: Any) -> Self:
        """Returns some kernels of a stack: their bits, as XLA for CPUs widens a whole stack of floats to take one of it."""
        bits = lax.bitcast_convert_type(self.values, jnp.uint16)[index]
        return dataclasses.replace(self, values=lax.bitcast_convert_type(bits, self.values.dtype))

    def times(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns `x @ kernel`."""
        rows = math.prod(x.shape[:-1])
        if self.few and isinstance(rows, int) and rows <= MOST_MULTIPLIED and x.dtype == jnp.float32:
            return multiply_few_rows(x, self.values)
        return self.multiplied(x, lambda x, values: x @ values.astype(x.dtype))

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


def widened_late(kernel: Any) -> Any:
    """Returns a large kernel of 16 bits, or a stack of such, as one that is widened where it is multiplied; others as they are."""
    of_16_bits = isinstance(kernel, jax.Array) and kernel.dtype in (jnp.bfloat16, jnp.float16)
    large = of_16_bits and kernel.ndim in (2, 3) and math.prod(kernel.shape[-2:]) >= LEAST_WEIGHTS
    return Narrow(kernel) if large else kernel


def decodes_few(rows: Any, dtype: DTypeLike) -> bool:
    """Returns whether a program that computes in `dtype` and decodes so many rows multiplies by kernels in bfloat16 as they are."""
    return platforms.target() == "cpu" and isinstance(rows, int) and rows <= MOST_DECODED and dtype == jnp.float32


def for_few(kernel: Any, few: bool) -> Any:
    """Returns a kernel as `few` says: an array in bfloat16, if it is large and no stack, as one that stays so."""
    values = kernel.values if isinstance(kernel, Narrow) else kernel
    array = isinstance(values, jax.Array) and values.ndim == 2 and values.dtype == jnp.bfloat16
    fitting = few and array and values.size >= LEAST_WEIGHTS
    if isinstance(kernel, Narrow):
        return dataclasses.replace(kernel, few=fitting)
    return Narrow(kernel, few=True) if fitting else kernel


def multiply_few_rows(
    x: Float32[Array, "*B D"], values: BFloat16[Array, "D F"], *, implementation: str | None = None
) -> Float32[Array, "*B F"]:
    """Returns `x @ values` in float32. implementation: one of FEW_ROWS; by default DEFAULT's for the platform."""
    return platforms.run(FEW_ROWS, DEFAULT, implementation, x, values)


def _widened(x: Array, values: Array) -> Array:
    return x @ values.astype(x.dtype)


def _parts(x: Array, values: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(jnp.concatenate(thirds(rows)), values, preferred_element_type=jnp.float32)
    largest, middle, least = product.reshape(3, rows.shape[0], -1)
    return (least + middle + largest).reshape(*x.shape[:-1], -1)


def thirds(x: Float32[Array, "*B"]) -> list[BFloat16[Array, "*B"]]:
    """Returns three arrays in bfloat16 whose sum is x to the bit, the largest first (where it is no denormal number)."""
    found = []
    for _ in range(3):
        # Bits are cut off, as XLA may leave out a conversion to bfloat16 and back.
        head = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
        found.append(head.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(x), x - head, 0)
    return found


FEW_ROWS = {"reference": _widened, "parts": _parts}
DEFAULT = {"cpu": "parts", "other": "reference"}
