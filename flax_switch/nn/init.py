"""Makes the parameters of a model, and tells the names of their axes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from flax_switch.config import SwitchConfig
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer


def init_params(model: SwitchEncoder | SwitchConfig, rng: Array) -> dict[str, Any]:
    """Makes parameters as plain nested dicts of arrays, of a model or of the `SwitchTransformer` of a config.

    Compiled; inside another jit it can lay them straight into their shardings.
    """
    return _init_params(SwitchTransformer(model) if isinstance(model, SwitchConfig) else model, rng)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _init_params(model: SwitchEncoder, rng: Array) -> dict[str, Any]:
    return model.init({"params": rng}, *example_inputs(model))["params"]


def logical_axes(model: SwitchEncoder) -> dict:
    """Returns the tree of parameters with each leaf replaced by its tuple of logical axis names; allocates nothing."""
    boxed = jax.eval_shape(lambda rng: model.init_boxed({"params": rng}, *example_inputs(model))["params"], jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def example_inputs(model: SwitchEncoder) -> tuple[Int[Array, "1 1"], ...]:
    """Returns the smallest inputs a model can be initialised with."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return (ids, ids) if isinstance(model, SwitchTransformer) else (ids,)
