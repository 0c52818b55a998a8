"""T5's attention: no scaling of logits, additive relative position biases, softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
) -> Bool[Array, "B 1 Q T"] | Bool[Array, "1 1 Q T"] | None:
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
    if query_segments is not None:
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
    logits = jnp.einsum("BQHK,BTHK->BHQT", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits += jnp.where(mask, 0.0, MASKED)  # added, not selected: fully masked rows keep upstream's gradient
    probs = jax.nn.softmax(logits, axis=-1)  # float32: bfloat16 sums of small probabilities drift
    weights = probs.astype(value.dtype)
    if dropout_rng is not None and dropout_rate > 0.0:
        B, H, _, T = weights.shape
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, (B, H, 1, T))
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0).astype(value.dtype)
    # Heads before positions: XLA's processor backend takes twice the time for the product it would choose itself.
    output = jnp.einsum("BHQT,BHTK->BHQK", weights, value.transpose(0, 2, 1, 3))
    return output.transpose(0, 2, 1, 3), probs
