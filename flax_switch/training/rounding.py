"""Parameters held in bfloat16: updates are added in float32 and rounded up or down by chance, so that small ones are not lost."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from flax_switch.config import ExperimentConfig, check
from flax_switch.config.finetuning import FinetuneConfig

_DRAW = 0x5EED  # folded into a step's key, so that rounding draws from none of the streams that the model does


def check_rounding(config: ExperimentConfig | FinetuneConfig) -> None:
    """Raises `ConfigError` where `optimizer.stochastic_rounding` is for other parameters than the model has."""
    check(
        not config.optimizer.stochastic_rounding or config.model.param_dtype == "bfloat16",
        f"optimizer.stochastic_rounding is for parameters in bfloat16; model.param_dtype is {config.model.param_dtype!r}. Set "
        "model.param_dtype='bfloat16', or leave stochastic_rounding out.",
    )


def in_float32(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Makes an optimiser whose state and updates are float32, whatever the parameters and gradients are."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return optimizer.update(wide(updates), state, wide(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: optimizer.init(wide(params)), update)


def apply_rounded(params: Any, updates: Any, key: Array) -> Any:
    """Adds updates in float32 and rounds each sum to one of its two neighbours in bfloat16, on average to itself."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, _DRAW), len(leaves))
    sums = [p.astype(jnp.float32) + u for p, u in zip(leaves, tree.flatten_up_to(updates), strict=True)]
    return tree.unflatten([rounded(x, key) for x, key in zip(sums, keys, strict=True)])


def rounded(x: Float[Array, "*shape"], key: Array) -> Array:
    """Rounds float32 to bfloat16, up with the probability that the bits cut off say; what is not finite stays as it is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up_or_down = jax.lax.bitcast_convert_type((bits + chance) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up_or_down, x).astype(jnp.bfloat16)
