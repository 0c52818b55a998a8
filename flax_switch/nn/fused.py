"""The fused layer: attention and MLP from one norm, with one projection into both and one back."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.nn.attention import RelativePositionBias, attend, placed, query_factor
from flax_switch.nn.cache import KeyValue, LayerCache
from flax_switch.nn.layer import LayerInputs
from flax_switch.nn.layers import Dropout, Initializer, RMSNorm, kernel_of, scaled_init
from flax_switch.nn.moe import Features, SparseProjection
from flax_switch.nn.outputs import LayerOutput
from flax_switch.ops.kernels.adapted import whole
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.kernels.quantized import Quantized
from flax_switch.ops.moe.routing import RouterOutput


class Projection(nn.Module):
    """x @ kernel [*inputs, *outputs], over tokens with one or two axes of features."""

    config: SwitchConfig
    inputs: Features
    outputs: Features
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B L *inputs"]) -> Float[Array, "B L *outputs"]:
        config, axes = self.config, (*self.inputs, *self.outputs)
        shape = (*self.inputs.values(), *self.outputs.values())
        kernel = whole(kernel_of(self, self.kernel_init, shape, axes, config.param_dtype, "float"))
        assert not isinstance(kernel, (Quantized, Narrow))  # both are refused
        rows = x.reshape(*x.shape[:2], -1).astype(config.dtype)
        y = project(rows, kernel.reshape(rows.shape[-1], -1).astype(config.dtype))
        return y.reshape(*x.shape[:2], *self.outputs.values())


class FusedLayer(nn.Module):
    """A decoder-only layer with fused projections, as in flaxformer's parallel fused decoder.

    Parameters: q_wi_fused [D, H, K + n F/H], of each head its query, then its parts of wi_0 and wi_1; kv_fused [D, 1, 2 K], a key
    and a value for all heads; o_wo_fused [H, K + F/H, D]. Where the layer is sparse, those in config.fused_sparse have experts.
    """

    config: SwitchConfig
    stack: StackConfig
    sparse: bool

    def setup(self) -> None:
        config = self.config
        H, K, part = config.num_heads, config.d_kv, config.d_ff // config.num_heads
        embed = {"embed": config.d_model}
        hidden = {"heads": H, "o_wo_fused": K + part}
        self.layer_norm = RMSNorm(config)
        if config.has_bias_tables and config.relative_attention_per_layer:
            self.relpos_bias = RelativePositionBias(config, bidirectional=False)
        queries_and_mlp = {"heads": H, "q_wi_fused": K + len(config.mlp_activations) * part}
        self.q_wi_fused = self._projection("q_wi", embed, queries_and_mlp, self._q_wi_init)
        self.kv_fused = self._projection("kv", embed, {"multiquery_heads": 1, "kv_fused": 2 * K}, _init(config, 1))
        self.o_wo_fused = self._projection("o_wo", hidden, embed, _init(config, 2))
        self.mlp_dropout = Dropout(config.activation_dropout, broadcast_axes=(-3,))
        self.dropout = Dropout(config.dropout_rate)

    def _projection(self, name: str, inputs: Features, outputs: Features, init: Initializer) -> Any:
        if self.sparse and name in self.config.fused_sparse:
            return SparseProjection(self.config, self.stack.causal, inputs=inputs, outputs=outputs, kernel_init=init)
        return Projection(self.config, inputs, outputs, init)

    def _q_wi_init(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        kernel = _init(self.config, 1)(key, shape, dtype)
        return kernel.at[..., : self.config.d_kv].multiply(query_factor(self.config))

    def __call__(
        self, x: Float[Array, "B Q D"], inputs: LayerInputs, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B Q D"], LayerOutput]:
        """Runs the layer; with a cache, keys and values are appended to it at `inputs.cache_index`."""
        config, deterministic, routers = self.config, inputs.deterministic, []
        x = inputs.devices.keep_batch_split(x)
        normed = self.layer_norm(x)  # padding is not zeroed here, as it is not in flaxformer
        query, *branches = jnp.split(self._run(self.q_wi_fused, normed, inputs, routers), self._parts, axis=-1)
        key, value = jnp.split(self._run(self.kv_fused, normed, inputs, routers), 2, axis=-1)
        query, key = (placed(part, inputs.cache_index, config) for part in (query, key))
        keys_values = KeyValue(key, value)
        if cache is not None:
            keys_values = cache.past.append(keys_values, inputs.cache_index)
            cache = dataclasses.replace(cache, past=keys_values)
        bias = inputs.bias
        if cache is None and config.has_bias_tables and config.relative_attention_per_layer:
            bias = self.relpos_bias(x.shape[1], inputs.mask)
        rng = (lambda: self.make_rng("dropout")) if not deterministic else None
        attended, probs = attend(query, keys_values, config, bias=bias, mask=inputs.mask, make_rng=rng, devices=inputs.devices)
        hidden = self.mlp_dropout.after(config.mlp_activations, branches, deterministic=deterministic)
        y = self._run(self.o_wo_fused, jnp.concatenate([attended, hidden], axis=-1), inputs, routers)
        x += self.dropout(y, deterministic=deterministic)
        return x, LayerOutput(tuple(routers), probs if inputs.output_attentions else None, None, cache)

    @property
    def _parts(self) -> tuple[int, ...]:
        """Where, in a head's part of q_wi, the branches of the MLP begin."""
        config = self.config
        return tuple(config.d_kv + i * config.d_ff // config.num_heads for i in range(len(config.mlp_activations)))

    def _run(self, projection: Any, x: Array, inputs: LayerInputs, routers: list[RouterOutput]) -> Array:
        """Projects, and notes how an own router decided."""
        if not isinstance(projection, SparseProjection):
            return projection(x)
        y, router = projection(x, **inputs.routing)
        routers.append(router)
        return y


def _init(config: SwitchConfig, inputs: int) -> Initializer:
    """Returns the initialiser of a kernel whose first `inputs` axes are contracted."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        flat = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        return scaled_init(config)(key, flat, dtype).reshape(shape)

    return init
