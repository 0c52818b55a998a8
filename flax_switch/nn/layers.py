"""Linear, norms, embedding, dropout and the dense MLP: the parts every layer is made of.

Every parameter is declared with the logical names of its axes beside its shape; `flax_switch.parallel.mesh` maps the names to
mesh axes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_switch.config import SwitchConfig
from flax_switch.config.weights import SCALE, stored
from flax_switch.ops.dropout import dropout
from flax_switch.ops.ids import check_ids
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.kernels.quantized import Kernel, with_scale
from flax_switch.ops.mlp import hidden_units
from flax_switch.ops.norms import layer_norm, rms_norm
from flax_switch.parallel.gathering import InParts

Initializer = Callable[..., Any]
Fan = Literal["fan_in", "fan_avg"]
Distribution = Literal["normal", "truncated_normal", "uniform"]


def scaled_init(
    config: SwitchConfig, mode: Fan = "fan_in", distribution: Distribution = "normal", factor: float = 1.0
) -> Initializer:
    """Makes a variance-scaling initialiser with the config's `init_scale` (Switch, table 3: 0.1), its deviation times `factor`."""
    return jax.nn.initializers.variance_scaling(config.init_scale * factor**2, mode, distribution)


def kernel_of(
    module: nn.Module, init: Initializer, shape: Sequence[int], axes: Sequence[str], dtype: Any, weights: str, used_as: Any = None
) -> Kernel:
    """Declares a module's parameter "kernel" with its logical axes and returns it; a quantised one has its scales beside it.

    used_as: the dtype in which one that lies in parts is gathered; by default its own.
    """

    def declare(name: str, init: Initializer, shape: Sequence[int], axes: Sequence[str | None], dtype: Any) -> Any:
        found = module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.dtype(dtype), unbox=False)
        return found.whole(used_as) if used_as and isinstance(found, InParts) else nn.unbox(found)

    if weights == "float" or _held_as_floats(module):
        return declare("kernel", init, shape, axes, dtype)
    form, zeros = stored(shape, weights, axes), nn.initializers.zeros_init()  # it is read from a checkpoint, never drawn
    values = declare("kernel", zeros, form.values, form.axes, form.dtype)
    return with_scale(values, declare(f"kernel{SCALE}", zeros, form.scale, form.axes, form.scale_dtype))


def _held_as_floats(module: nn.Module) -> bool:
    """Returns whether a module was given its quantised kernel as floats (`convert.quantize.as_floats`)."""
    given = jax.tree.leaves(module.get_variable("params", "kernel")) if module.has_variable("params", "kernel") else ()
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in given[:1])  # the base of one with an adapter comes first


class Linear(nn.Module):
    """x @ kernel, in `dtype`; with `bias` (T5 has none) + bias."""

    features: int
    axes: tuple[str, str]
    kernel_init: Callable
    dtype: str
    param_dtype: str
    weights: str = "float"
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        shape = (x.shape[-1], self.features)
        kernel = kernel_of(self, self.kernel_init, shape, self.axes, self.param_dtype, self.weights, self.dtype)
        y = project(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.bias:
            return y
        zeros: Initializer = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
        return y + along_last(self.param("bias", zeros, (self.features,), jnp.dtype(self.param_dtype)), y).astype(self.dtype)


def along_last(x: Float[Array, " F"], y: Float[Array, "*B F"]) -> Float[Array, "*ones F"]:
    """Returns a vector with as many axes as `y` has, to go with its last one."""
    return x.reshape((1,) * (y.ndim - 1) + (-1,))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; the statistics in float32."""

    config: SwitchConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        init: Initializer = nn.with_logical_partitioning(jax.nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        return rms_norm(x, scale, epsilon=self.config.layer_norm_epsilon, dtype=self.config.dtype)


class LayerNorm(nn.Module):
    """The norm of 1607.06450, which takes the mean off and adds a bias; the statistics in float32."""

    config: SwitchConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        parts = []
        for name, init in (("scale", jax.nn.initializers.ones), ("bias", jax.nn.initializers.zeros)):
            declared: Initializer = nn.with_logical_partitioning(init, ("embed",))
            parts.append(self.param(name, declared, (x.shape[-1],), jnp.dtype(self.config.param_dtype)))
        return layer_norm(x, *parts, epsilon=self.config.layer_norm_epsilon, dtype=self.config.dtype)


def norm_of(config: SwitchConfig) -> nn.Module:
    """Makes a norm of the kind that a config asks for."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config)


class Embedding(nn.Module):
    """Token embeddings, which may be the output head's kernel, too."""

    config: SwitchConfig

    def setup(self) -> None:
        deviation = 1.0 if self.config.embedding_scale == "head" else self.config.d_model**-0.5
        init: Initializer = nn.with_logical_partitioning(jax.nn.initializers.normal(deviation), ("vocab", "embed"))
        shape = (self.config.vocab_size, self.config.d_model)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(self.config.param_dtype))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        check_ids("The token ids", ids, self.config.vocab_size)
        return (self.embedding[ids] * self.config.input_scale).astype(self.config.dtype)

    def table(self) -> Float[Array, "V D"]:
        """Returns all embeddings, of which a tied head makes logits: h * D**-0.5 @ E^T (see `embedding_scale`)."""
        return self.embedding


class HeadKernel(nn.Module):
    """The kernel [D, V] of an output head that is not the embeddings themselves."""

    config: SwitchConfig

    @nn.compact
    def __call__(self) -> Kernel:
        """Returns it."""
        config, init = self.config, scaled_init(self.config, distribution="truncated_normal")
        shape = (config.d_model, config.vocab_size)
        return kernel_of(self, init, shape, ("embed", "vocab"), config.param_dtype, config.head_weights)


class Dropout(nn.Module):
    """Dropout with one mask for all positions of a sequence (flaxformer's broadcast over the length)."""

    rate: float
    broadcast_axes: Sequence[int] = (-2,)

    def __call__(self, x: Float[Array, "*B L D"], *, deterministic: bool) -> Float[Array, "*B L D"]:
        return dropout(x, self.rate, self._rng(deterministic), broadcast_axes=self.broadcast_axes)

    def after(self, activations: tuple[str, ...], branches: Sequence[Array], *, deterministic: bool) -> Array:
        """Returns the product of the branches' activations, dropped."""
        rng, axes = self._rng(deterministic), tuple(self.broadcast_axes)
        return hidden_units(branches, activations, dropout_rate=self.rate, dropout_rng=rng, broadcast_axes=axes)

    def _rng(self, deterministic: bool) -> PRNGKeyArray | None:
        return None if deterministic or self.rate == 0.0 else self.make_rng("dropout")


class MLP(nn.Module):
    """The dense MLP: wi, activation, dropout, wo; gated where the config names two activations (wi_0, wi_1)."""

    config: SwitchConfig
    features: int | None = None  # F; None: config.d_ff

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, deterministic: bool) -> Float[Array, "B L D"]:
        config = self.config
        activations = config.mlp_activations
        names = [f"wi_{i}" for i in range(len(activations))] if config.is_gated else ["wi"]
        init, numerics = scaled_init(config, distribution="truncated_normal"), (config.dtype, config.param_dtype, config.weights)
        branches = []
        for name in names:
            linear = Linear(self.features or config.d_ff, ("embed", "mlp"), init, *numerics, bias=config.use_bias, name=name)
            branches.append(linear(x))
        hidden = Dropout(config.activation_dropout).after(activations, branches, deterministic=deterministic)
        return Linear(x.shape[-1], ("mlp", "embed"), init, *numerics, bias=config.use_bias, name="wo")(hidden)
