"""Multiplies a single row of integers by a kernel, as in decoding one sequence on a CPU.

There XLA lays a kernel of integers out anew for every product, which for one row takes most of its time. A sum of products written
term by term is compiled to one loop that reads the kernel where it lies. Integers make no rounding errors, so both are the same.
"""

import itertools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

LANES = 32  # sums that go side by side; XLA adds up to as many in one pass
MOST_TERMS = 8  # of a sum: each takes time to compile, and more made steps no faster


def fits(rows: Int8[Array, "*B D"], values: Int8[Array, "*E F D"]) -> bool:
    """Returns whether `multiply_row` can take these: a single row, one kernel, and a width that is a multiple of LANES."""
    return math.prod(rows.shape[:-1]) == 1 and values.ndim == 2 and values.shape[-1] % LANES == 0


def multiply_row(row: Int8[Array, " D"], values: Int8[Array, "F D"]) -> Int32[Array, " F"]:
    """Returns `values @ row`, exactly."""
    terms = _terms(values.shape[1] // LANES)
    # Tied to the row, the kernel cannot be widened before a loop begins.
    row, values = lax.optimization_barrier((_once(row), values))
    kernel, parts = values.reshape(values.shape[0], -1, terms, LANES), row.reshape(1, -1, terms, LANES)
    products = (kernel[:, :, i].astype(jnp.int32) * parts[:, :, i].astype(jnp.int32) for i in range(terms))
    *_, total = itertools.accumulate(products)
    # Behind another one the product is not made again, or in one thread, by what takes it.
    return lax.optimization_barrier(total.sum(-1).sum(-1))


def _once(row: Array) -> Array:
    """Returns the row as a sum with zeros, which XLA makes before the product; it would round the row anew for every output."""
    first = lax.broadcasted_iota(jnp.int32, (2, len(row)), 0) == 0
    return lax.reduce(jnp.where(first, row, jnp.zeros_like(row)), jnp.zeros((), row.dtype), lax.add, (0,))


def _terms(parts: int) -> int:
    """Returns the largest number of terms that divides a row's parts evenly."""
    return max(n for n in range(1, MOST_TERMS + 1) if parts % n == 0)
