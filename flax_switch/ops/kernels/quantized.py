"""Multiplies rows by a quantised kernel (`config/weights.py`).

reference      the weights as float32 numbers, and their plain product
rounded_rows   int8 only: each row is rounded to 8 bits by a scale of its own, so that integers are multiplied. For CPUs, which
               multiply those several times as fast as float32; a single row by `one_row`
dequantized    the weights in the rows' dtype, and their product. Accelerators make them on the way to it, and read a quarter or an
               eighth of the bytes; the scales of int8 are left to the end
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import core
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Integer

from flax_switch.config.weights import kernel_shape
from flax_switch.ops.kernels import platforms
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.one_row import fits, multiply_row

LEAST_ROWS = 2  # a single row that `one_row` does not take gets one of zeros: XLA's product of integers is slow for it on a CPU
# A CPU multiplies by a kernel of no more weights as fast or faster in float32: rounding the rows costs more than integers save. The
# measurements are in docs/quantisation.md. It is no matter of the number of rows: what a sequence says must not depend on its batch
# mates.
FEW_WEIGHTS = 2**14


@flax.struct.dataclass
class Quantized:
    """A kernel, or a stack of them, in int8 or int4: used where an array [..., D, F] would be."""

    values: Integer[Array, "..."]  # int8 [..., F, D], or uint8 [..., F, D / 64, 32]
    scale: Float[Array, "..."]  # float32 [..., F, 1], or bfloat16 [..., F, D / 64, 1]

    @property
    def weights(self) -> str:
        """Its form, one of `config.weights.WEIGHTS`."""
        return "int4" if self.packed else "int8"

    @property
    def packed(self) -> bool:
        """Whether it is int4."""
        return self.values.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights: [..., D, F]."""
        return kernel_shape(self.values.shape, packed=self.packed)

    def astype(self, dtype: DTypeLike) -> Self:
        """Returns it as it is: products have the dtype of their rows."""
        return self

    def __getitem__(self, index: Any) -> Self:
        """Returns some kernels of a stack."""
        return jax.tree.map(lambda leaf: leaf[index], self)


Kernel = Array | Quantized | Narrow | Adapted


def faster_as_floats(shape: Sequence[int]) -> bool:
    """Returns whether products with a quantised kernel [..., D, F] are faster, here, where it is held as float32."""
    return jax.default_backend() == "cpu" and math.prod(shape[-2:]) <= FEW_WEIGHTS


def with_scale(values: Any, scale: Array | None) -> Any:
    """Returns the kernel that a parameter is, of a quantised one with its scales; one with an adapter keeps it.

    A kernel that is held as floats is the numbers themselves, and its scales are there to make it integers again.
    """
    if isinstance(values, Adapted):
        return dataclasses.replace(values, base=with_scale(values.base, scale))
    return values if scale is None or jnp.issubdtype(values.dtype, jnp.floating) else Quantized(values, scale)


def multiply(x: Float[Array, "*B D"], kernel: Kernel) -> Float[Array, "*B F"]:
    """Returns `x @ kernel` for a kernel of any form; as of arrays, stacks of both are multiplied member by member."""
    if isinstance(kernel, Adapted):
        return kernel.multiplied(x, multiply)
    if isinstance(kernel, Narrow):
        return kernel.times(x)
    return multiply_quantized(x, kernel) if isinstance(kernel, Quantized) else x @ kernel


def multiply_quantized(x: Float[Array, "*B D"], kernel: Quantized, *, implementation: str | None = None) -> Float[Array, "*B F"]:
    """Returns `x @ kernel` in x's dtype, exactly or with rows rounded to 8 bits: then by at most max|row| / 254 * sum|weights|.

    Its gradient is the exact product's, and by x alone.

    implementation: one of INT8 or INT4; by default DEFAULT's for the platform.
    """
    return _multiply_quantized(x, kernel, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_quantized(x: Array, kernel: Quantized, implementation: str | None) -> Array:
    table = INT4 if kernel.packed else INT8
    default = {platform: name for platform, name in DEFAULT.items() if name in table}
    return platforms.run(table, default, implementation, x, kernel)


def _quantized_forward(x, kernel, implementation):
    return _multiply_quantized(x, kernel, implementation), kernel


def _quantized_backward(implementation, kernel, gradient):
    return gradient @ dequantized(kernel, gradient.dtype).swapaxes(-1, -2), None


_multiply_quantized.defvjp(_quantized_forward, _quantized_backward)


def dequantized(kernel: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "... D F"]:
    """Returns the weights as numbers."""
    *lead, inputs, outputs = kernel.shape
    weights = _integers(kernel).astype(jnp.float32) * kernel.scale
    return weights.reshape(*lead, outputs, inputs).astype(dtype).swapaxes(-1, -2)


def _integers(kernel: Quantized) -> Array:
    """Returns the integers that scales multiply: [..., F, D], or of int4 [..., F, D / 64, 64]."""
    if not kernel.packed:
        return kernel.values
    return jnp.concatenate([kernel.values & 15, kernel.values >> 4], axis=-1).astype(jnp.int8) - 8


def _reference(x: Array, kernel: Quantized) -> Array:
    return (x.astype(jnp.float32) @ dequantized(kernel)).astype(x.dtype)


def _dequantized(x: Array, kernel: Quantized) -> Array:
    if kernel.packed:
        return x @ dequantized(kernel, x.dtype)
    product = _product(x, kernel.values.astype(x.dtype), jnp.float32)
    return (product * _channel_scale(x, kernel)).astype(x.dtype)


def _rounded_rows(x: Array, kernel: Quantized) -> Array:
    rows, row_scale = round_rows(x)
    if fits(rows, kernel.values):
        product = multiply_row(rows.reshape(-1), kernel.values).reshape(*x.shape[:-1], -1)
    else:
        product = _product(rows, kernel.values, jnp.int32, least=LEAST_ROWS)
    return (product.astype(jnp.float32) * row_scale * _channel_scale(x, kernel)).astype(x.dtype)


def round_rows(x: Float[Array, "*B D"]) -> tuple[Int8[Array, "*B D"], Float32[Array, "*B 1"]]:
    """Returns each row as integers from -127 to 127, and the scale that makes them the row again; zeros where it is zero."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def _channel_scale(x: Array, kernel: Quantized) -> Array:
    """Returns int8's scales in the shape that products of x have."""
    scale = kernel.scale.swapaxes(-1, -2)
    return scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def _product(x: Array, values: Array, dtype: DTypeLike, least: int = 0) -> Array:
    """Returns x times the transpose of values, or of each of a stack, in `dtype`; fewer rows than `least` get rows of zeros."""
    rows = x.reshape(-1, x.shape[-1]) if values.ndim == 2 else x
    count = rows.shape[-2]
    missing = core.max_dim(least - count, 0)  # the count may be a symbol
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, missing), (0, 0)])
    product = jnp.einsum("...RD,...FD->...RF", padded, values, preferred_element_type=dtype)
    return product[..., :count, :].reshape(*x.shape[:-1], values.shape[-2])


# int4's scales differ along a row, so that no whole product is one of integers.
INT4 = {"reference": _reference, "dequantized": _dequantized}
INT8 = {**INT4, "rounded_rows": _rounded_rows}
DEFAULT = {"cpu": "rounded_rows", "other": "dequantized"}
