"""Makes the parameters of a model, and tells the names of their axes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from flax_switch.config import SwitchConfig, check, expect
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.nn.attention import query_factor
from flax_switch.nn.heads import build_model
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer


def init_params(model: SwitchEncoder | SwitchConfig, rng: Array) -> dict[str, Any]:
    """Makes parameters as plain nested dicts of arrays, of a model, or of the one that a config describes.

    Compiled; inside another jit it can lay them straight into their shardings. Raises `ConfigError` for what is neither, for no
    key, or for quantised weights.
    """
    expect("model", model, (SwitchConfig, SwitchEncoder), "Give a config, such as fs.PRESETS['switch-tiny'].")
    check(hasattr(rng, "dtype"), f"rng must be a key, such as jax.random.key(0); it is of type {type(rng).__name__}.")
    model = build_model(model) if isinstance(model, SwitchConfig) else model
    model.config.check_trainable()
    return _init_params(model, rng)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _init_params(model: SwitchEncoder, rng: Array) -> dict[str, Any]:
    params = model.init({"params": rng}, *example_inputs(model))["params"]
    return with_copying_heads(params, model.config) if model.config.copying_heads else params


def with_copying_heads(params: dict, config: SwitchConfig) -> dict:
    """Returns parameters whose first `config.copying_heads` heads of every cross-attention have their queries' kernel as keys'.

    The product of the two, then a positive one, makes logits of like tokens large, as it is in trained models (2305.09828): what is
    to be copied through the encoder is found from the first step on. Later steps may change it.
    """
    copied = config.copying_heads * config.d_kv

    def begin(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {name: begin(value) for name, value in tree.items()}
        if cross := tree.get("encoder_decoder_attention"):
            queries = cross["query"]["kernel"][..., :copied] / query_factor(config)  # which begin smaller
            key = cross["key"]["kernel"]
            kernel = key.at[..., :copied].set(queries.astype(key.dtype))
            tree["encoder_decoder_attention"] = {**cross, "key": {**cross["key"], "kernel": kernel}}
        return tree

    return begin(params)


def abstract_params(model: SwitchEncoder) -> dict[str, Any]:
    """Returns the tree of parameters as shapes and dtypes; allocates nothing."""
    return jax.eval_shape(lambda rng: model.init({"params": rng}, *example_inputs(model))["params"], jax.random.key(0))


def logical_axes(model: SwitchEncoder) -> dict:
    """Returns the tree of parameters with each leaf replaced by its tuple of logical axis names; allocates nothing."""
    boxed = jax.eval_shape(lambda rng: model.init_boxed({"params": rng}, *example_inputs(model))["params"], jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def example_inputs(model: SwitchEncoder) -> tuple[Int[Array, "1 1"], ...]:
    """Returns the smallest inputs a model can be initialised with."""
    ids = jnp.zeros((1, 1), jnp.int32)
    twice = isinstance(model, SwitchTransformer) and not model.config.decoder_only and model.config.head == LANGUAGE_MODEL
    return (ids, ids) if twice else (ids,)
