"""T5's relative position biases: a table of buckets of distance, which by key minus query alone give a bias to every head."""

import functools

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.ops.kernels import Size


@flax.struct.dataclass
class RelativeBias:
    """A table of biases with what says which of its buckets a distance is in; small beside the array [1, H, Q, T] that it means."""

    table: Float[Array, "H buckets"]
    bidirectional: bool = flax.struct.field(pytree_node=False)
    max_distance: int = flax.struct.field(pytree_node=False)

    def array(self, query_length: Size, key_length: Size) -> Float[Array, "1 H Q T"]:
        """Returns the biases of all pairs."""
        return relative_position_bias(
            self.table, query_length, key_length, bidirectional=self.bidirectional, max_distance=self.max_distance
        )  # fmt: skip

    def diagonals(self, query_length: int, key_length: int) -> Float[Array, "H distances"]:
        """Returns in float32 the bias by distance, key minus query, from 1 - Q to T - 1."""
        buckets = relative_position_bucket(
            jnp.arange(1 - query_length, key_length),
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[1],
            max_distance=self.max_distance,
        )
        return self.table.astype(jnp.float32)[:, buckets]


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
