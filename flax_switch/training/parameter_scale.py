"""Rates relative to a parameter's size (1804.04235, section 8): each update is multiplied by the RMS of what it updates.

Embeddings of scale 1 and kernels of scale 0.05 then move by the same share of themselves in a step. Every expert, and every scanned
layer, is scaled by its own RMS, as if it were a parameter of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

BATCH_AXES = ("expert", "layers")
MIN_SCALE = 1e-3  # parameters near zero still move


def own_axes(names: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the axes of one expert's or layer's part of a parameter."""
    return tuple(i for i, name in enumerate(names) if name not in BATCH_AXES)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the root of the mean square over `axes`, which stay with length 1."""
    return jnp.sqrt(jnp.square(x).mean(axes, keepdims=True))


def parameter_scale(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns what an update is multiplied by: max(MIN_SCALE, RMS), in float32, for each expert and layer."""
    return jnp.maximum(rms(param.astype(jnp.float32), own_axes(names)), MIN_SCALE)


def scale_by_parameter_scale(axes: Any, scale: Callable[..., jax.Array] = parameter_scale) -> optax.GradientTransformation:
    """Multiplies updates by `scale` of the parameter; `axes` is the tree of logical axis names of the parameters."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p, names: u * scale(p, names), updates, params, axes), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
