"""Moving rows between tokens and experts by gathers in both directions, because scatter-adds are slow everywhere.

Taking rows and adding rows up are each other's transpose. A caller who knows, for every token, which rows came from it (its
`inverse`) lets both the forward and the backward pass gather.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from flax_switch.ops import Size
from flax_switch.ops.kept import keep_arguments


def _take(x: Shaped[Array, "G S D"], index: Int[Array, "G R"]) -> Shaped[Array, "G R D"]:
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def take_rows(x: Shaped[Array, "G S D"], index: Int[Array, "G R"], inverse: Int[Array, "G S N"] | None) -> Shaped[Array, "G R D"]:
    """Returns `out[g, r] = x[g, index[g, r]]`; zero where the index is S.

    inverse: for every s the rows r with index[r] == s, filled up with R; None if there may be many, and then the gradient is
    a scatter-add.
    """
    return _take(x, index)


@jax.custom_vjp
def _sum_rows(rows: Shaped[Array, "G R D"], index: Int[Array, "G R"], inverse: Int[Array, "G S N"]) -> Shaped[Array, "G S D"]:
    first, *others = (_take(rows, inverse[..., n]) for n in range(inverse.shape[-1]))
    return sum(others, start=first)


def sum_rows(
    rows: Shaped[Array, "G R D"], index: Int[Array, "G R"], inverse: Int[Array, "G S N"] | None, num_tokens: Size
) -> Shaped[Array, "G S D"]:
    """Returns `out[g, s] = sum of rows[g, r] over r with index[g, r] == s`, the transpose of `take_rows` with its arguments."""
    if inverse is not None:
        return _sum_rows(rows, index, inverse)
    zeros = jnp.zeros((rows.shape[0], num_tokens, rows.shape[2]), rows.dtype)
    return jax.vmap(lambda z, i, r: z.at[i].add(r, mode="drop"))(zeros, index, rows)


def weighted(rows: Shaped[Array, "*R D"], weights: Float[Array, "*R 1"]) -> Float[Array, "*R D"]:
    """Returns rows times their weights in float32; for the backward pass the rows are kept in their own dtype."""
    return keep_arguments(jnp.multiply, rows, weights)


def _take_forward(x, index, inverse):
    return _take(x, index), (index, inverse, x.shape[1])


def _take_backward(residuals, gradient):
    index, inverse, num_tokens = residuals
    return sum_rows(gradient, index, inverse, num_tokens), None, None


def _sum_forward(rows, index, inverse):
    return _sum_rows(rows, index, inverse), (index, inverse)


def _sum_backward(residuals, gradient):
    index, inverse = residuals
    return take_rows(gradient, index, inverse), None, None


take_rows.defvjp(_take_forward, _take_backward)
_sum_rows.defvjp(_sum_forward, _sum_backward)
