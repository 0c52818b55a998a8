"""Attention itself: logits, softmax in float32 and the weighted sum, with the gradients written out."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from flax_switch.ops.kernels import platforms

MASKED = -1e10  # finite, so that a row with nothing to attend to gives the mean instead of NaN


def attend(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    bias: Float[Array, "#B #H Q T"] | None,
    mask: Bool[Array, "#B 1 #Q T"] | None,
    keep: Float[Array, "B H 1 T"] | None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H Q K"], Float[Array, "B H Q T"]]:
    """Returns attention's output, and the probabilities before dropout.

    keep: 0 for dropped keys, 1 / (1 - rate) for the others. implementation: one of IMPLEMENTATIONS; by default DEFAULT's.
    """
    return platforms.run(IMPLEMENTATIONS, DEFAULT, implementation, query, key, value, bias, mask, keep)


def _reference(query, key, value, bias, mask, keep):
    logits = jnp.einsum("BHQK,BHTK->BHQT", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits += jnp.where(mask, 0.0, MASKED)  # added, not selected: fully masked rows keep upstream's gradient
    probs = jax.nn.softmax(logits, axis=-1)  # float32: bfloat16 sums of small probabilities drift
    return jnp.einsum("BHQT,BHTK->BHQK", _dropped(probs, keep, value.dtype), value), probs


# Differentiated by JAX the reference gives the same numbers, but on a CPU the sum of the bias's gradient over the batch takes
# longer than any product, and transposed products are slow, too (base shape, batch 4, length 256, forward and backward: 75 ms
# against 43).
_written_out = jax.custom_vjp(_reference)


def _dropped(probs: Float[Array, "B H Q T"], keep: Float[Array, "B H 1 T"] | None, dtype: DTypeLike) -> Float[Array, "B H Q T"]:
    weights = probs.astype(dtype)
    return weights if keep is None else weights * keep


def _attend_forward(*args):
    query, key, value, bias, mask, keep = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    output, probs = _reference(query, key, value, bias, mask, keep)
    return (output, probs), (query, key, value, bias, keep, probs)


def _attend_backward(residuals, gradients):
    query, key, value, bias, keep, probs = residuals
    d_output, d_probs = gradients
    zero = jax.custom_derivatives.SymbolicZero
    d_logits = jnp.zeros_like(probs)
    d_value = jnp.zeros_like(value)
    total = None if isinstance(d_probs, zero) else d_probs
    if not isinstance(d_output, zero):
        d_weights = jnp.einsum("BHQK,BHTK->BHQT", d_output, value, preferred_element_type=jnp.float32)
        d_value = _sum_over_queries(_dropped(probs, keep, value.dtype), d_output)
        if keep is not None:
            d_weights *= keep
        total = d_weights if total is None else total + d_weights
    if total is not None:
        d_logits = probs * (total - (probs * total).sum(-1, keepdims=True))
    products = d_logits.astype(query.dtype)
    d_query = jnp.einsum("BHQT,BHTK->BHQK", products, key)
    d_key = _sum_over_queries(products, query)
    d_bias = None if bias is None else _sum_to(d_logits, bias.shape).astype(bias.dtype)
    return d_query, d_key, d_value, d_bias, None, None


_written_out.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)

IMPLEMENTATIONS = {"reference": _reference, "written_out": _written_out}
DEFAULT = {"other": "written_out"}


def _sum_over_queries(weights: Float[Array, "B H Q T"], rows: Float[Array, "B H Q K"]) -> Float[Array, "B H T K"]:
    """Sums for each key the queries' rows, by weight."""
    return platforms.run(SUMS_OVER_QUERIES, {"cpu": "rows_transposed", "other": "reference"}, None, weights, rows)


def _rows_transposed(weights: Float[Array, "B H Q T"], rows: Float[Array, "B H Q K"]) -> Float[Array, "B H T K"]:
    # A CPU's fast products take no transposed left factor (ops/kernels/projection), and the rows are the smaller to transpose.
    rows = jax.lax.optimization_barrier(rows.swapaxes(2, 3))
    return jnp.einsum("BHKQ,BHQT->BHKT", rows, weights).swapaxes(2, 3)


SUMS_OVER_QUERIES = {
    "reference": lambda weights, rows: jnp.einsum("BHQT,BHQK->BHTK", weights, rows),
    "rows_transposed": _rows_transposed,
}


def _sum_to(x: Float[Array, "B H Q T"], shape: tuple[int, ...]) -> Float[Array, "#B #H Q T"]:
    """Sums `x` over the axes that have size 1 in `shape`."""
    if shape[0] == 1 < x.shape[0]:
        x = sum_over_batch(x)[None]
    return x.sum(1, keepdims=True) if shape[1] == 1 < x.shape[1] else x


def sum_over_batch(x: Float[Array, "B H Q T"]) -> Float[Array, "H Q T"]:
    """Sums over the first axis."""
    return platforms.run(SUMS_OVER_BATCH, {"cpu": "product", "other": "reference"}, None, x)


SUMS_OVER_BATCH = {
    "reference": lambda x: x.sum(0),
    # XLA's CPU backend takes 20 times as long for a sum over a short leading axis.
    "product": lambda x: jnp.einsum("B,BHQT->HQT", jnp.ones(x.shape[0], x.dtype), x),
}


def cached_attention(
    query: Float[Array, "R Q H K"],
    key: Float[Array, "G #H K T"],
    value: Float[Array, "G #H K T"],
    *,
    bias: Float[Array, "1 H Q T"] | None = None,
    mask: Bool[Array, "#G 1 #queries T"] | None = None,
) -> tuple[Float[Array, "R Q H K"], Float[Array, "R H Q T"]]:
    """Computes `dot_product_attention` of few queries over keys and values laid out for them, columns last.

    The R rows are G groups of neighbours that read the same columns. mask: by group and, for all rows of a group one after the
    other, by query. Keys and values of one head are all heads', and are not copied.
    """
    (R, Q, H, K), G = query.shape, key.shape[0]
    query, columns = query.reshape(G, -1, H, K), "GHKT"
    if key.shape[1] == 1:
        key, value, columns = key[:, 0], value[:, 0], "GKT"
    logits = jnp.einsum(f"GQHK,{columns}->GHQT", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias if Q == 1 else jnp.tile(bias, (1, 1, R // G, 1))
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    probs = jax.nn.softmax(logits, axis=-1)
    output = jnp.einsum(f"GHQT,{columns}->GQHK", probs.astype(value.dtype), value).reshape(R, Q, H, K)
    return output, probs.reshape(G, H, R // G, Q, -1).swapaxes(1, 2).reshape(R, H, Q, -1)
