"""Sinusoidal positions (1706.03762, section 3.5), laid out as in fairseq: first all sines, then all cosines."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def numbered(
    counted: Bool[Array, "B L"], segment_ids: Int[Array, "B L"] | None, first: Int[Array, "#B 1"] | Int[Array, ""] | int = 0
) -> Int[Array, "B L"]:
    """Returns the number of each place among those counted of its row, or packed segment, which begins with `first` + 1."""
    count = jnp.cumsum(counted.astype(jnp.int32), axis=1)
    if segment_ids is not None:
        begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        count -= jax.lax.cummax(jnp.where(begins, count - counted, 0), axis=1)
    return count + first


def sinusoids(number: Int[Array, "B L"], width: int, *, offset: int) -> Float[Array, "B L D"]:
    """Returns the vectors of tokens by their number, which begins with 1; zeros for 0. The angles of number -offset are 0."""
    half = width // 2
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1)))
    angle = (number + offset).astype(jnp.float32)[..., None] * frequency[None, None]
    vectors = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.where(number[..., None] > 0, vectors, 0.0)
