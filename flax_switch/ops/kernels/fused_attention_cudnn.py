"""Fused attention on NVIDIA GPUs by cuDNN, for bfloat16: its biases are an array, [1, H, Q, T], which the batch shares.

cuDNN lays any mask of its own out by row, [B, H, Q, T]. Masks of queries and keys go into the products instead: features beside
those of queries and keys whose product is 0 where both are real, and otherwise so low that nothing else counts.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_switch.ops.kernels.attention import MASKED
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible

log = logging.getLogger(__name__)

HIDDEN, ABSENT = -1e30, -1e38  # the logits of masked pairs, beside which MASKED is nothing, and of keys that only fill up a length
FEATURES = 8  # are added where there are masks; K must be a multiple of it
LARGEST = 128  # K of a head, on every GPU that cuDNN's kernels are for


def takes(query: Float[Array, "B H Q K"], visible: Visible) -> bool:
    """Returns whether this attention can be cuDNN's, with the reference's mean where a query sees nothing, and a GPU is here.

    Segments and prefixes are not its. With causality a row sees nothing if its own query is masked; if only keys were, a row
    might see nothing before its own place.
    """
    width = query.shape[3] + FEATURES
    return (
        query.dtype == jnp.bfloat16
        and width % FEATURES == 0
        and width <= LARGEST
        and all(x is None for x in (visible.query_segments, visible.key_segments, visible.prefix_mask))
        and (not visible.causal or visible.key_mask is None or visible.query_mask is not None)
        and jax.default_backend() == "gpu"
        and lowers(width)
    )


@functools.cache
def lowers(width: int) -> bool:
    """Returns whether cuDNN's attention with a bias, and its gradient, compiles for the GPU of this process."""
    part, bias = jax.ShapeDtypeStruct((1, 64, 1, width), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.bfloat16)
    try:
        total = lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, b, scale=1.0, implementation="cudnn").sum()  # noqa: E731
        jax.jit(jax.grad(total, (0, 1, 2, 3))).lower(part, part, part, bias).compile()
    except Exception as error:  # whatever it is that is missing, the blocks in plain JAX need none of it
        log.info("Attention is not cuDNN's: %s", error)
        return False
    return True


def attend(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    bias: RelativeBias | None,
    visible: Visible,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B H Q K"]:
    """Returns attention's output for what `takes` says yes to. implementation: "xla" computes the same anywhere, plainly."""
    (_, H, Q, K), T = query.shape, key.shape[2]
    of_queries, of_keys = _features(query, key, visible)

    def filled(x: Array, features: list[Array]) -> Array:
        """Adds features and, where the length is odd, a place; returns [B, L, H, K]."""
        wide = [jnp.broadcast_to(each[:, None, :, None], (*x.shape[:3], 1)).astype(x.dtype) for each in features]
        room = FEATURES - len(wide) if of_queries else 0
        x = jnp.concatenate([x, *wide, jnp.zeros((*x.shape[:3], room), x.dtype)], axis=-1)
        return jnp.pad(x, [(0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0)]).swapaxes(1, 2)

    one, other = filled(query, of_queries), filled(key, of_keys)
    if T % 2:
        other = other.at[:, T, :, K].set(ABSENT)  # where every query has 1
    array = None if bias is None else bias.array(Q, T)
    if visible.causal:
        later = jnp.where(jnp.tril(jnp.ones((Q, T), bool)), 0.0, MASKED)[None, None]
        array = jnp.broadcast_to(later, (1, H, Q, T)) if array is None else array + later
    if array is not None:
        array = jnp.pad(array, [(0, 0), (0, 0), (0, Q % 2), (0, T % 2)]).astype(query.dtype)
    output = jax.nn.dot_product_attention(one, other, filled(value, []), array, scale=1.0, implementation=implementation)
    return output[:, :Q, :, :K].swapaxes(1, 2)


def _features(query: Array, key: Array, visible: Visible) -> tuple[list[Array], list[Array]]:
    """Returns numbers for queries and for keys, [B, L]; the sum of their products is 0 where both are real, else HIDDEN."""
    B, Q, T = query.shape[0], query.shape[2], key.shape[2]
    of_queries, of_keys = [], []
    if T % 2:
        of_queries, of_keys = [jnp.ones((B, Q))], [jnp.zeros((B, T))]
    if visible.query_mask is not None or visible.key_mask is not None:
        real = jnp.ones((B, Q), bool) if visible.query_mask is None else visible.query_mask
        masked = jnp.zeros((B, T)) if visible.key_mask is None else jnp.where(visible.key_mask, 0.0, HIDDEN)
        of_queries, of_keys = [*of_queries, ~real, real], [*of_keys, jnp.full((B, T), HIDDEN), masked]
    return of_queries, of_keys
