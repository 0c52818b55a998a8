"""Mixtures of experts as Flax modules: they hold parameters; `flax_switch.ops.moe` computes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.config.weights import BIAS
from flax_switch.nn.layers import Initializer, kernel_of
from flax_switch.ops.kernels.adapted import whole
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.on_disk import first_on_disk
from flax_switch.ops.kernels.quantized import Kernel, Quantized
from flax_switch.ops.moe.block import MoEParams, moe_block
from flax_switch.ops.moe.groups import flaxformer_replicas
from flax_switch.ops.moe.routing import RouterOutput
from flax_switch.parallel.placement import ONE_DEVICE, Placement


class KernelParam(nn.Module):
    """One parameter called "kernel" (and with `bias`, one called "bias"), declared with its logical axes.

    lead: how many axes, of members of a stack, the bias shares with the kernel.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    dtype: Any
    bias: bool = False
    weights: str = "float"
    lead: int = 0

    @nn.compact
    def __call__(self) -> tuple[Kernel, Array | None]:
        """Returns the kernel, and the bias over its last axis (and that of members) or None."""
        kernel = kernel_of(self, self.initializer, self.shape, self.axes, self.dtype, self.weights)
        if not self.bias:
            return kernel, None
        zeros: Initializer = nn.with_logical_partitioning(nn.initializers.zeros_init(), (*self.axes[: self.lead], self.axes[-1]))
        return kernel, self.param("bias", zeros, (*self.shape[: self.lead], self.shape[-1]), self.dtype)


def each_expert(init: Initializer) -> Initializer:
    """Makes an initialiser of [E, ...] that draws each expert by its own key, so that expert e is the same for any E."""

    def init_experts(key, shape, dtype):
        one = lambda e: init(jax.random.fold_in(key, e), shape[1:], dtype)  # noqa: E731
        return jax.vmap(one)(jnp.arange(shape[0]))

    return init_experts


class MLPKernels(nn.Module):
    """The kernels and biases of an MLP, or of E of them on a leading "expert" axis."""

    config: SwitchConfig
    num_experts: int | None = None

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """Returns {"wi" | "wi_0", "wi_1": [(E,) D, F], "wo": [(E,) F, D]}, and biases as "wi_bias": [(E,) 1, F] and so on."""
        config = self.config
        D, F = config.d_model, config.expert_width
        init = nn.initializers.variance_scaling(config.init_scale, "fan_in", "normal")
        lead, lead_axis = (), ()
        if self.num_experts is not None:
            lead, lead_axis, init = (self.num_experts,), ("expert",), each_expert(init)
        names = ("wi_0", "wi_1") if config.is_gated else ("wi",)
        shapes = {**dict.fromkeys(names, ((D, F), ("embed", "mlp"))), "wo": ((F, D), ("mlp", "embed"))}
        numerics = (config.param_dtype, config.use_bias, config.weights, len(lead))
        kernels: dict[str, Any] = {}
        for name, (shape, axes) in shapes.items():
            kernels[name], bias = KernelParam((*lead, *shape), (*lead_axis, *axes), init, *numerics, name=name)()
            if bias is not None:
                kernels[f"{name}{BIAS}"] = bias[..., None, :]
        return kernels


Features = Mapping[str, int]  # logical axes of a token's features, with their sizes: {"embed": D}, {"heads": H, ...}


class RouterWeights(nn.Module):
    """The router's kernel [D, E], for tokens with several axes of features [*features, E], and, where asked for, bias [E]."""

    config: SwitchConfig
    features: Features | None = None

    @nn.compact
    def __call__(self) -> tuple[Array | Narrow, Array | None]:
        """Returns (kernel, bias or None)."""
        config, features = self.config, self.features or {"embed": self.config.d_model}
        shape, axes = (*features.values(), config.num_experts), (*features, "unmodeled")
        init = nn.initializers.normal(config.router_init_std)
        kernel, bias = KernelParam(shape, axes, init, config.param_dtype, config.router_bias, name="w")()
        kernel = whole(kernel)
        assert not isinstance(kernel, Quantized)  # a router stays float in every model
        return kernel, bias


class Router(nn.Module):
    """A module that puts the router's parameters at the path that T5X checkpoints have: router/router_weights/w/kernel."""

    config: SwitchConfig
    features: Features | None = None

    @nn.compact
    def __call__(self) -> tuple[Array | Narrow, Array | None]:
        """Returns (kernel, bias or None)."""
        return RouterWeights(self.config, self.features, name="router_weights")()


class _Sparse(nn.Module):
    """What experts need, whatever they compute: how to route, and their random streams.

    Random streams: "jitter" where router_jitter_noise or expert_masking_rate, "dropout" where an expert's dropout rate is not 0;
    both only if not deterministic.
    """

    config: SwitchConfig
    causal: bool = False

    def _routed(
        self,
        params: MoEParams,
        x: Float[Array, "B L D"],
        *,
        padding_mask: Bool[Array, "B L"] | None,
        deterministic: bool,
        token_ids: Int[Array, "B L"] | None = None,
        with_logits: bool = False,
        devices: Placement = ONE_DEVICE,
    ) -> tuple[Float[Array, "B L D_out"], RouterOutput]:
        """Routes and computes; see `ops.moe.block.moe_block`.

        padding_mask: True for real tokens, or None. token_ids: for hash routing. with_logits: return the router's logits too.
        """
        config = self.config
        return moe_block(
            params,
            x,
            config=config,
            padding_mask=padding_mask,
            deterministic=deterministic,
            token_ids=token_ids,
            jitter_rng=self._rng("jitter", max(config.router_jitter_noise, config.expert_masking_rate), deterministic),
            dropout_rng=self._rng("dropout", config.expert_dropout, deterministic),
            causal=self.causal,
            replicas=flaxformer_replicas(config.num_experts) if config.routing_group == "flaxformer" else 1,
            with_logits=with_logits,
            devices=devices,
        )

    def _rng(self, stream: str, rate: float, deterministic: bool):
        return None if deterministic or rate == 0.0 else self.make_rng(stream)


class SparseMLP(_Sparse):
    """A mixture of experts in place of a dense MLP (2101.03961, section 2)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], **options: Any) -> tuple[Float[Array, "B L D"], RouterOutput]:
        """Returns the experts' outputs, with the options of `_routed`."""
        config, devices = self.config, options.get("devices", ONE_DEVICE)
        router_kernel, router_bias = Router(config, name="router")() if config.learned_router else (None, None)
        expert = first_on_disk(self.get_variable("params", "expert")) if self.has_variable("params", "expert") else None
        if expert is None:
            expert = MLPKernels(config, devices.own_experts(config.num_experts), name="expert")()
        shared = MLPKernels(config, name="shared_expert")() if config.shared_expert else None
        unstacked = self.get_variable("unstacked", "experts") if self.has_variable("unstacked", "experts") else None
        return self._routed(MoEParams(router_kernel, router_bias, expert, shared, unstacked), x, **options)


class SparseProjection(_Sparse):
    """A mixture of experts that are one matrix each, in place of a projection of a fused layer.

    Parameters: expert/kernel [E, *inputs, *outputs] and the router's [*inputs, E].
    """

    inputs: Features = dataclasses.field(kw_only=True)
    outputs: Features = dataclasses.field(kw_only=True)
    kernel_init: Initializer = dataclasses.field(kw_only=True)

    @nn.compact
    def __call__(self, x: Float[Array, "B L *inputs"], **options: Any) -> tuple[Float[Array, "B L *outputs"], RouterOutput]:
        """Returns the experts' projections, with the options of `_routed`."""
        config, devices = self.config, options.get("devices", ONE_DEVICE)
        shape, axes = (*self.inputs.values(), *self.outputs.values()), ("expert", *self.inputs, *self.outputs)
        D, D_out = math.prod(self.inputs.values()), math.prod(self.outputs.values())
        router_kernel = router_bias = None
        if config.learned_router:
            router_kernel, router_bias = Router(config, self.inputs, name="router")()
            assert not isinstance(router_kernel, Narrow)
            router_kernel = router_kernel.reshape(D, config.num_experts)
        E = devices.own_experts(config.num_experts)
        kernel, _ = KernelParam((E, *shape), axes, each_expert(self.kernel_init), config.param_dtype, name="expert")()
        kernel = whole(kernel)
        assert not isinstance(kernel, (Quantized, Narrow))  # both are refused
        params = MoEParams(router_kernel, router_bias, {"kernel": kernel.reshape(E, D, D_out)})
        y, router = self._routed(params, x.reshape(*x.shape[:2], D), **options)
        return y.reshape(*x.shape[:2], *self.outputs.values()), router
