"""One vector for a row of states: their mean over tokens, or the state at a position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_switch.ops import AnyArray


def mean_of_tokens(states: Float[Array, "B L D"], mask: AnyArray | None) -> Float[Array, "B D"]:
    """Returns the mean of the states where mask [B, L] is not 0 (None: of all) in float32; zeros for a row of padding."""
    counted = jnp.ones(states.shape[:2], jnp.float32) if mask is None else jnp.asarray(mask).astype(jnp.float32)
    total = jnp.einsum("BLD,BL->BD", states.astype(jnp.float32), counted)
    return total / jnp.maximum(counted.sum(-1, keepdims=True), 1.0)


def normalized(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns vectors of length 1; zeros stay zeros, and have a gradient."""
    squares = jnp.square(vectors).sum(-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(squares, 1e-24))


def last_of(states: Float[Array, "B L D"], where: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Returns the state at the last position of each row where it is true; at the first position of a row where it never is."""
    places = jnp.arange(states.shape[1])[None] * where
    return jnp.take_along_axis(states, places.max(1)[:, None, None], axis=1)[:, 0]
