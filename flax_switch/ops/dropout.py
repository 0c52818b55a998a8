"""Dropout by a counter-based hash: a mask costs about what reading the activations costs, on any backend.

JAX's default generator spends some hundred operations on 32 random bits, which on a CPU takes longer than a small model's matrix
products. Dropout needs far less: whether an element is kept is a function of the key and of the element's index, mixed until
no structure is left. Nothing is drawn one after the other, so XLA fuses the mask into its user, and cuts it like its user.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns a bijection of 32-bit words in which every bit depends on every other (constants: C. Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def random_words(rng: PRNGKeyArray, shape: Sequence[int]) -> UInt32[Array, "*shape"]:
    """Returns uniform 32-bit words, good enough for dropout and no more than that.

    Each row (all axes but the last) has two words of its own, made of its index and the key's last two; an element's word mixes
    them with its column. The result depends on key and shape alone, not on how the array is cut over devices.
    """
    first, second = jax.random.key_data(rng).reshape(-1)[-2:]
    *lead, columns = shape
    row = jax.lax.iota(jnp.uint32, math.prod(lead)).reshape(*lead, 1)
    start, salt = _mix(_mix(row + first) ^ second), _mix(_mix(row + second) ^ ~first)
    column = jax.lax.broadcasted_iota(jnp.uint32, (*(1 for _ in lead), columns), len(lead))
    return _mix(_mix(start + column) ^ salt)


def random_uniform(rng: PRNGKeyArray, shape: Sequence[int], low: float, high: float) -> Float[Array, "*shape"]:
    """Returns float32 numbers of 2**24 equally probable values from `low` on to below `high`, of `random_words`."""
    steps = (random_words(rng, shape) >> 8).astype(jnp.float32)
    return low + steps * jnp.float32((high - low) * 2.0**-24)


def keep_mask(rng: PRNGKeyArray, rate: float, shape: Sequence[int]) -> Bool[Array, "*shape"]:
    """Returns True with probability 1 - rate, to within 2**-32."""
    return random_words(rng, shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def dropout(x: Array, rate: float, rng: PRNGKeyArray | None, *, broadcast_axes: Sequence[int] = ()) -> Array:
    """Sets elements to zero with probability `rate` and scales the others up; no change where `rng` is None or the rate 0.

    broadcast_axes: axes along which all elements share one draw. flaxformer shares it along a sequence's length.
    """
    if rng is None or rate == 0.0:
        return x
    return _dropped(rate, tuple(broadcast_axes), x, rng)


def relu_dropout(x: Array, rate: float, rng: PRNGKeyArray | None, *, broadcast_axes: Sequence[int] = ()) -> Array:
    """Returns `dropout(relu(x))`; where it is 0, so is the gradient, and no more than that is kept for the backward pass."""
    if rng is None or rate == 0.0:
        return _relu_dropped(0.0, (), x, None)
    return _relu_dropped(rate, tuple(broadcast_axes), x, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dropped(rate: float, broadcast_axes: tuple[int, ...], x: Array, rng: PRNGKeyArray) -> Array:
    """Computes `dropout`; the backward pass makes the mask again, which in a scan over layers would be kept for each of them."""
    shared = [axis % x.ndim for axis in broadcast_axes]
    keep = keep_mask(rng, rate, [1 if axis in shared else size for axis, size in enumerate(x.shape)])
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


_dropped.defvjp(
    lambda rate, broadcast_axes, x, rng: (_dropped(rate, broadcast_axes, x, rng), rng),
    lambda rate, broadcast_axes, rng, gradient: (_dropped(rate, broadcast_axes, gradient, rng), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _relu_dropped(rate: float, broadcast_axes: tuple[int, ...], x: Array, rng: PRNGKeyArray | None) -> Array:
    active = jax.nn.relu(x)
    return active if rng is None else _dropped(rate, broadcast_axes, active, rng)


def _relu_forward(rate: float, broadcast_axes: tuple[int, ...], x: Array, rng: PRNGKeyArray | None) -> tuple[Array, Array]:
    kept: Array = _relu_dropped(rate, broadcast_axes, x, rng)
    return kept, kept


def _relu_backward(rate: float, broadcast_axes: tuple[int, ...], kept: Array, gradient: Array) -> tuple[Array, None]:
    zero = jnp.zeros((), gradient.dtype)
    return jnp.where(kept > 0, gradient / jnp.asarray(1.0 - rate, gradient.dtype), zero), None


_relu_dropped.defvjp(_relu_forward, _relu_backward)
