"""T5's attention: no scaling of logits, additive relative position biases, softmax in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_switch.ops.dropout import keep_mask

MASKED = -1e10  # finite, so that a row with nothing to attend to gives the mean instead of NaN


def relative_position_bucket(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """The bucket of each relative position (key minus query): exact up close, logarithmic further out (T5, section 2.1).

    Bidirectional stacks spend half the buckets on keys to the right; causal ones put everything to the right in bucket 0.
    """
    offset = 0
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    # A table made by numpy: XLA's logarithm differs in the last bit, which moves ties at the buckets' borders.
    n = np.arange(max_distance + 1)
    exact = num_buckets // 2
    log_ratio = np.log(np.maximum(n, 1).astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    far = np.minimum(exact + (log_ratio * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    table = jnp.asarray(np.where(n < exact, n, far).astype(np.int32))
    return offset + table[jnp.minimum(distance, max_distance)]


def relative_position_bias(
    table: Float[Array, "H buckets"],
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool,
    max_distance: int,
    query_offset: Int[Array, ""] | int = 0,
) -> Float[Array, "1 H Q T"]:
    """The additive bias for queries at query_offset + 0..Q-1 and keys at 0..T-1, in float32.

    Biases depend on key minus query alone, so Q+T-1 values are looked up and laid out along the diagonals; the gradient is
    then a sum along diagonals instead of Q*T scattered additions.
    """
    Q, T, W = query_length, key_length, query_length + key_length
    # values[d mod W] is the bias at relative position d, for d = -Q .. T-1
    distance = jnp.arange(W)
    distance = jnp.where(distance >= T, distance - W, distance) - query_offset
    buckets = relative_position_bucket(distance, bidirectional=bidirectional, num_buckets=table.shape[1], max_distance=max_distance)
    values = table.astype(jnp.float32)[:, buckets]
    # Rows of length W, read again with length W-1: each row starts one further to the left.
    rows = jnp.broadcast_to(values[:, None, :], (table.shape[0], Q, W)).reshape(table.shape[0], Q * W)
    return rows[:, : Q * (W - 1)].reshape(1, table.shape[0], Q, W - 1)[..., :T]


def attention_mask(
    query_mask: Bool[Array, "B Q"] | None,
    key_mask: Bool[Array, "B T"] | None,
    *,
    causal_shape: tuple[int, int] | None = None,
    query_segments: Int[Array, "B Q"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
) -> Bool[Array, "#B 1 #Q T"] | None:
    """Which keys a query may attend to: real ones, of its own segment and, with `causal_shape` (Q, T), not to its right."""
    mask = None

    def both(extra):
        return extra if mask is None else mask & extra

    if causal_shape is not None:
        mask = both(jnp.tril(jnp.ones(causal_shape, bool))[None, None])
    if key_mask is not None:
        mask = both(key_mask[:, None, None, :])
    if query_mask is not None:
        mask = both(query_mask[:, None, :, None])
    if query_segments is not None and key_segments is not None:
        mask = both((query_segments[:, :, None] == key_segments[:, None, :])[:, None])
    return mask


def dot_product_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H K"],
    *,
    bias: Float[Array, "#B #H Q T"] | None = None,
    mask: Bool[Array, "#B 1 #Q T"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> tuple[Float[Array, "B Q H K"], Float[Array, "B H Q T"]]:
    """Attention outputs, and the probabilities before dropout (float32).

    Logits are not divided by sqrt(K): T5 folds that into the initialisation of the queries. Dropout, when `dropout_rng` is
    given, drops a key for all queries of a head at once (broadcast over Q, as flaxformer's).
    """
    # Heads before positions: XLA's processor backend takes twice the time for the products it would choose itself.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    keep = None
    if dropout_rng is not None and dropout_rate > 0.0:
        B, H, T, _ = key.shape
        kept = keep_mask(dropout_rng, dropout_rate, (B, H, 1, T))
        keep = kept.astype(value.dtype) / (1.0 - dropout_rate)
    output, probs = _attend(query, key, value, bias, mask, keep)
    return output.transpose(0, 2, 1, 3), probs


@jax.custom_vjp
def _attend(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    bias: Float[Array, "#B #H Q T"] | None,
    mask: Bool[Array, "#B 1 #Q T"] | None,
    keep: Float[Array, "B H 1 T"] | None,
) -> tuple[Float[Array, "B H Q K"], Float[Array, "B H Q T"]]:
    """Attention whose gradients are written out.

    Differentiated by JAX it gives the same numbers, but on a processor the sum of the bias's gradient over the batch takes
    longer than any product, and transposed products are slow, too (base shape, batch 4, length 256, forward and
    backward: 75 ms against 43). keep: 0 for dropped keys, 1 / (1 - rate) for the others.
    """
    logits = jnp.einsum("BHQK,BHTK->BHQT", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits += jnp.where(mask, 0.0, MASKED)  # added, not selected: fully masked rows keep upstream's gradient
    probs = jax.nn.softmax(logits, axis=-1)  # float32: bfloat16 sums of small probabilities drift
    return jnp.einsum("BHQT,BHTK->BHQK", _dropped(probs, keep, value.dtype), value), probs


def _dropped(probs: Float[Array, "B H Q T"], keep: Float[Array, "B H 1 T"] | None, dtype: DTypeLike) -> Float[Array, "B H Q T"]:
    weights = probs.astype(dtype)
    return weights if keep is None else weights * keep


def _attend_forward(*args):
    query, key, value, bias, mask, keep = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    output, probs = _attend(query, key, value, bias, mask, keep)
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


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _sum_over_queries(weights: Float[Array, "B H Q T"], rows: Float[Array, "B H Q K"]) -> Float[Array, "B H T K"]:
    """For each key the sum of the queries' rows, by weight."""

    def small_factor_first(weights, rows):
        # A processor's fast products take no transposed left factor (ops/projection), and the rows are the smaller to transpose.
        rows = jax.lax.optimization_barrier(rows.swapaxes(2, 3))
        return jnp.einsum("BHKQ,BHQT->BHKT", rows, weights).swapaxes(2, 3)

    product = lambda weights, rows: jnp.einsum("BHQT,BHQK->BHTK", weights, rows)  # noqa: E731
    return jax.lax.platform_dependent(weights, rows, cpu=small_factor_first, default=product)


def _sum_to(x: Float[Array, "B H Q T"], shape: tuple[int, ...]) -> Float[Array, "#B #H Q T"]:
    """The sum of `x` over the axes that have size 1 in `shape`."""
    if shape[0] == 1 < x.shape[0]:
        # As a product: XLA's processor backend takes 20 times as long for a sum over a short leading axis.
        by_product = lambda x: jnp.einsum("B,BHQT->HQT", jnp.ones(x.shape[0], x.dtype), x)  # noqa: E731
        x = jax.lax.platform_dependent(x, cpu=by_product, default=lambda x: x.sum(0))[None]
    return x.sum(1, keepdims=True) if shape[1] == 1 < x.shape[1] else x
