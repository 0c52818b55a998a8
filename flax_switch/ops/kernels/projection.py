"""Multiplies rows by one kernel, and computes its gradient, in the forms that a CPU is fast at."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_switch.ops.kernels import platforms
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.quantized import Quantized, multiply_quantized

FEW_ROWS = 64


def project(x: Float[Array, "*B D"], kernel: Float[Array, "D F"] | Quantized | Narrow | Adapted) -> Float[Array, "*B F"]:
    """Returns `x @ kernel`; its gradient is `kernel_gradient`, of a quantised or narrow kernel there is none."""
    if isinstance(kernel, Adapted):
        return kernel.multiplied(x, project)
    if isinstance(kernel, Narrow):
        return kernel.times(x)
    return multiply_quantized(x, kernel) if isinstance(kernel, Quantized) else _project(x, kernel)


@jax.custom_vjp
def _project(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    return gradient @ kernel.T, kernel_gradient(x, gradient, x.dtype)


_project.defvjp(_forward, _backward)


def kernel_gradient(
    x: Float[Array, "*B D"], gradient: Float[Array, "*B F"], dtype: DTypeLike, *, implementation: str | None = None
) -> Float[Array, "D F"]:
    """Sums x^T gradient over rows, in `dtype`.

    implementation: one of KERNEL_GRADIENTS; by default "transposed_first" on a CPU where the gradient is as wide as x or wider,
    which pays for a pass over x, and "reference" elsewhere.
    """
    bound = {name: functools.partial(product, dtype=dtype) for name, product in KERNEL_GRADIENTS.items()}
    on_cpu = "transposed_first" if x.shape[-1] <= gradient.shape[-1] else "reference"
    return platforms.run(bound, {"cpu": on_cpu, "other": "reference"}, implementation, x, gradient)


def _reference_gradient(x: Array, gradient: Array, dtype: DTypeLike) -> Array:
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=dtype)


def _transposed_first(x: Array, gradient: Array, dtype: DTypeLike) -> Array:
    # XLA's fast products on a CPU take no transposed left factor, and would not transpose it themselves. The barrier keeps the
    # transposition apart from the product.
    x, gradient = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    return jnp.matmul(lax.optimization_barrier(x.T), gradient, preferred_element_type=dtype)


KERNEL_GRADIENTS = {"reference": _reference_gradient, "transposed_first": _transposed_first}


def project_transposed(
    x: Float[Array, "*B D"], kernel: Float[Array, "V D"], *, implementation: str | None = None
) -> Float[Array, "*B V"]:
    """Returns `x @ kernel.T`.

    implementation: one of TRANSPOSED_PROJECTIONS; by default "kernel_first" on a CPU for few rows, where the left factor is read
    where it lies, and "reference" elsewhere.
    """
    rows = math.prod(x.shape[:-1])
    few = isinstance(rows, int) and rows <= FEW_ROWS  # a symbol may be any number
    default = {"cpu": "kernel_first", "other": "reference"} if few else {"other": "reference"}
    return platforms.run(TRANSPOSED_PROJECTIONS, default, implementation, x, kernel)


def _reference_transposed(x: Array, kernel: Array) -> Array:
    return x @ kernel.T


def _kernel_first(x: Array, kernel: Array) -> Array:
    return (kernel @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)


TRANSPOSED_PROJECTIONS = {"reference": _reference_transposed, "kernel_first": _kernel_first}
