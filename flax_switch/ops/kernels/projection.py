"""Products of rows with one kernel, and its gradient, in the forms that a CPU is fast at."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FEW_ROWS = 64


@jax.custom_vjp
def project(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel`, with `kernel_gradient` for its gradient."""
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    return gradient @ kernel.T, kernel_gradient(x, gradient, x.dtype)


project.defvjp(_forward, _backward)


def kernel_gradient(x: Float[Array, "*B D"], gradient: Float[Array, "*B F"], dtype: DTypeLike) -> Float[Array, "D F"]:
    """The sum over rows of x^T gradient, in `dtype`."""

    def product(x, gradient):
        rows = tuple(range(x.ndim - 1))
        return lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=dtype)

    def transposed_first(x, gradient):
        # XLA's fast products on a processor take no transposed left factor, and would not transpose it themselves. The barrier
        # keeps the transposition apart from the product.
        x, gradient = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
        return jnp.matmul(lax.optimization_barrier(x.T), gradient, preferred_element_type=dtype)

    # Transposing x costs a pass over it, which a wide gradient pays for.
    on_cpu = transposed_first if x.shape[-1] <= gradient.shape[-1] else product
    return lax.platform_dependent(x, gradient, cpu=on_cpu, default=product)


def project_transposed(x: Float[Array, "*B D"], kernel: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """`x @ kernel.T`; a CPU reads a kernel where it lies, for few rows, when it is the left factor."""

    def product(x, kernel):
        return x @ kernel.T

    def kernel_first(x, kernel):
        return (kernel @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)

    few = math.prod(x.shape[:-1]) <= FEW_ROWS
    return lax.platform_dependent(x, kernel, cpu=kernel_first, default=product) if few else product(x, kernel)
