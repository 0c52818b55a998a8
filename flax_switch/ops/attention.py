"""T5's attention: no scaling of logits, additive relative position biases, softmax in float32."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.ops import Size
from flax_switch.ops.dropout import keep_mask
from flax_switch.ops.kernels.attention import attend


def relative_position_bucket(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """Returns the bucket of each relative position (key minus query): exact up close, logarithmic further out (T5, section 2.1).

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
    query_length: Size,
    key_length: Size,
    *,
    bidirectional: bool,
    max_distance: int,
    query_offset: Int[Array, ""] | Size = 0,
) -> Float[Array, "1 H Q T"]:
    """Returns the additive bias for queries at query_offset + 0..Q-1 and keys at 0..T-1, in float32.

    Biases depend on key minus query alone, so Q+T-1 values are looked up and laid out along the diagonals; the gradient is
    then a sum along diagonals instead of Q*T scattered additions.
    """
    Q, T, W = query_length, key_length, query_length + key_length
    buckets_of = functools.partial(
        relative_position_bucket, bidirectional=bidirectional, num_buckets=table.shape[1], max_distance=max_distance
    )  # fmt: skip
    if not isinstance(W, int):  # a symbol's diagonals are not known; such programs are exported, and have no gradient
        return table.astype(jnp.float32)[:, buckets_of(jnp.arange(T)[None] - jnp.arange(Q)[:, None] - query_offset)][None]
    # values[d mod W] is the bias at relative position d, for d = -Q .. T-1
    distance = jnp.arange(W)
    distance = jnp.where(distance >= T, distance - W, distance) - query_offset
    values = table.astype(jnp.float32)[:, buckets_of(distance)]
    # Rows of length W, read again with length W-1: each row starts one further to the left.
    rows = jnp.broadcast_to(values[:, None, :], (table.shape[0], Q, W)).reshape(table.shape[0], Q * W)
    return rows[:, : Q * (W - 1)].reshape(1, table.shape[0], Q, W - 1)[..., :T]


def attention_mask(
    query_mask: Bool[Array, "B Q"] | None,
    key_mask: Bool[Array, "B T"] | None,
    *,
    causal_shape: tuple[Size, Size] | None = None,
    prefix_mask: Bool[Array, "B T"] | None = None,
    query_segments: Int[Array, "B Q"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
) -> Bool[Array, "#B 1 #Q T"] | None:
    """Returns which keys a query may attend to: real ones, of its own segment and, with `causal_shape` (Q, T), not to its right.

    prefix_mask: of causal attention, positions that see each other nevertheless.
    """
    mask = None

    def both(extra):
        return extra if mask is None else mask & extra

    if causal_shape is not None:
        causal = jnp.tril(jnp.ones(causal_shape, bool))[None, None]
        if prefix_mask is not None:
            causal = causal | (prefix_mask[:, None, :, None] & prefix_mask[:, None, None, :])
        mask = both(causal)
    if key_mask is not None:
        mask = both(key_mask[:, None, None, :])
    if query_mask is not None:
        mask = both(query_mask[:, None, :, None])
    if query_segments is not None and key_segments is not None:
        mask = both((query_segments[:, :, None] == key_segments[:, None, :])[:, None])
    return mask


def self_attention_mask(
    config: SwitchConfig,
    mask: Bool[Array, "B L"] | None,
    segment_ids: Int[Array, "B L"] | None,
    *,
    causal: bool = False,
    length: Size = 0,
    prefix_mask: Bool[Array, "B L"] | None = None,
) -> Bool[Array, "#B 1 #L L"] | None:
    """Returns who attends to whom in teacher-forced self-attention.

    Where the config zeroes padding, padded queries attend to nothing (flaxformer); else they attend like others (Hugging Face).
    """
    return attention_mask(
        mask if config.zero_padding_activations else None,
        mask,
        causal_shape=(length, length) if causal else None,
        prefix_mask=prefix_mask,
        query_segments=segment_ids,
        key_segments=segment_ids,
    )


def cross_attention_mask(
    config: SwitchConfig,
    target_mask: Bool[Array, "B L"] | None,
    source_mask: Bool[Array, "sources S"] | None,
    target_segments: Int[Array, "B L"] | None,
    source_segments: Int[Array, "sources S"] | None,
    cached: bool,
) -> Bool[Array, "_ 1 #L S"] | None:
    """Returns which source positions a target position may attend to."""
    query_mask = target_mask if config.zero_padding_activations and not cached else None
    return attention_mask(query_mask, source_mask, query_segments=target_segments, key_segments=source_segments)


def rotate(x: Float[Array, "B L H K"], first: Int[Array, ""] | int) -> Float[Array, "B L H K"]:
    """Turns pairs of features (i, i + K/2) of the tokens at places `first` and following by place / 10000**(2i / K) (2104.09864).

    Products of queries and keys then depend on the distance of their places alone.
    """
    K = x.shape[-1]
    frequency = 10000.0 ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    place = (first + jnp.arange(x.shape[1])).astype(jnp.float32)
    angle = place[None, :, None, None] * frequency[None, None, None]  # [1, L, 1, K/2]
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B T #H K"],
    value: Float[Array, "B T #H K"],
    *,
    bias: Float[Array, "#B #H Q T"] | None = None,
    mask: Bool[Array, "#B 1 #Q T"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> tuple[Float[Array, "B Q H K"], Float[Array, "B H Q T"]]:
    """Returns attention outputs, and the probabilities before dropout (float32). Keys and values of one head are all heads'.

    Logits are not divided by sqrt(K): T5 folds that into the initialisation of the queries. Dropout, when `dropout_rng` is
    given, drops a key for all queries of a head at once (broadcast over Q, as flaxformer's).
    """
    # Heads before positions: XLA's CPU backend takes twice the time for the order it would choose itself.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    key, value = (jnp.broadcast_to(x, (x.shape[0], query.shape[1], *x.shape[2:])) for x in (key, value))
    keep = None
    if dropout_rng is not None and dropout_rate > 0.0:
        B, H, T, _ = key.shape
        kept = keep_mask(dropout_rng, dropout_rate, (B, H, 1, T))
        keep = kept.astype(value.dtype) / (1.0 - dropout_rate)
    output, probs = attend(query, key, value, bias, mask, keep)
    return output.transpose(0, 2, 1, 3), probs
