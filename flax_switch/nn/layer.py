"""One transformer layer: attention, in the decoder cross-attention, and a dense or sparse MLP, each with norm and residual."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.nn.attention import Attention, RelativePositionBias
from flax_switch.nn.cache import KeyValue, LayerCache
from flax_switch.nn.layers import MLP, Dropout, norm_of
from flax_switch.nn.moe import SparseMLP
from flax_switch.nn.outputs import LayerOutput
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible
from flax_switch.ops.moe.expert_parallel import EXCHANGED
from flax_switch.ops.moe.routing import RouterOutput
from flax_switch.parallel.gathering import keep_all_but_gathered
from flax_switch.parallel.placement import ONE_DEVICE, Placement


@flax.struct.dataclass
class LayerInputs:
    """What every layer of a stack is given alike. Masks are True where there is something."""

    bias: RelativeBias | Float[Array, "1 H Q T"] | None  # relative position bias, where it is not of the layer's own table
    mask: Visible | Bool[Array, "#G 1 #queries T"] | None  # of self-attention; `Visible` asks for the fused form
    padding_mask: Bool[Array, "B Q"] | None  # which positions hold tokens
    token_ids: Int[Array, "B Q"] | None = None  # where routing goes by them
    encoded: Float[Array, "B S D"] | None = None
    cross_mask: Visible | Bool[Array, "#sources 1 #Q S"] | None = None
    cache_index: Int[Array, ""] | int = 0  # the first token's place in the cache
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)
    output_router_logits: bool = flax.struct.field(pytree_node=False, default=False)
    output_attentions: bool = flax.struct.field(pytree_node=False, default=False)
    devices: Placement = flax.struct.field(pytree_node=False, default=ONE_DEVICE)

    @property
    def routing(self) -> dict[str, Any]:
        """What a sparse module is told."""
        return dict(
            padding_mask=self.padding_mask,
            deterministic=self.deterministic,
            token_ids=self.token_ids,
            with_logits=self.output_router_logits,
            devices=self.devices,
        )


class Layer(nn.Module):
    """A layer of the encoder or decoder, or with layer_form="parallel" one whose attention and MLP share a norm."""

    config: SwitchConfig
    stack: StackConfig
    sparse: bool

    def setup(self) -> None:
        config = self.config
        if config.layer_form == "parallel":
            self.layer_norm = norm_of(config)
            self.self_attention = Attention(config)
        elif self.stack.causal:
            self.pre_self_attention_layer_norm = norm_of(config)
            self.self_attention = Attention(config)
        else:
            self.pre_attention_layer_norm = norm_of(config)
            self.attention = Attention(config)
        if self.stack.attends_to_source:
            self.pre_cross_attention_layer_norm = norm_of(config)
            self.encoder_decoder_attention = Attention(config)
        if config.has_bias_tables and config.relative_attention_per_layer:
            self.relpos_bias = RelativePositionBias(config, bidirectional=not self.stack.causal)
        if config.layer_form == "sequential":
            self.pre_mlp_layer_norm = norm_of(config)
        self.mlp = SparseMLP(config, self.stack.causal) if self.sparse else MLP(config)
        if self.sparse and config.extra_mlp:
            self.pre_extra_mlp_layer_norm = norm_of(config)
            self.extra_mlp = MLP(config)
        self.dropout = Dropout(config.dropout_rate)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> KeyValue:
        """Returns keys and values of the encoder's output, which decoding computes once."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(
        self, x: Float[Array, "B Q D"], inputs: LayerInputs, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B Q D"], LayerOutput]:
        """Runs the layer; with a cache, keys and values are appended to it at `inputs.cache_index`."""
        x = inputs.devices.keep_batch_split(x)
        deterministic, cross_probs = inputs.deterministic, None
        if self.config.layer_form == "parallel":
            normed = self.layer_norm(x)  # padding is not zeroed here, as it is not in flaxformer
            y, probs, cache = self._attend_to_itself(normed, inputs, cache)
            computed, routers = self._compute(normed, inputs)
            x += self.dropout((y + computed) * 2**-0.5, deterministic=deterministic)
        else:
            norm = self.pre_self_attention_layer_norm if self.stack.causal else self.pre_attention_layer_norm
            y, probs, cache = self._attend_to_itself(self._normed(norm, x, inputs), inputs, cache)
            x += self.dropout(y, deterministic=deterministic)
            if self.stack.attends_to_source:
                y, cross_probs = self._attend_to_source(x, inputs, cache)
                x += self.dropout(y, deterministic=deterministic)
            y, routers = self._compute(self._normed(self.pre_mlp_layer_norm, x, inputs), inputs)
            x += self.dropout(y, deterministic=deterministic)

        if self.sparse and self.config.extra_mlp:
            y = self._normed(self.pre_extra_mlp_layer_norm, x, inputs)
            x += self.dropout(self.extra_mlp(y, deterministic=deterministic), deterministic=deterministic)

        if not inputs.output_attentions:
            probs = cross_probs = None
        return x, LayerOutput(routers, probs, cross_probs, cache)

    def _attend_to_itself(
        self, y: Float[Array, "B Q D"], inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q T"] | None, LayerCache | None]:
        attention = self.self_attention if self.stack.causal else self.attention
        keys_values = attention.keys_values(y, inputs.cache_index)
        if cache is not None:
            keys_values = cache.past.append(keys_values, inputs.cache_index)
            cache = dataclasses.replace(cache, past=keys_values)
        bias = inputs.bias
        if cache is None and self.config.has_bias_tables and self.config.relative_attention_per_layer:
            bias = self.relpos_bias(y.shape[1], inputs.mask)
        y, probs = attention(
            y, keys_values, bias=bias, mask=inputs.mask, deterministic=inputs.deterministic, first=inputs.cache_index,
            devices=inputs.devices,
        )  # fmt: skip
        return y, probs, cache

    def _attend_to_source(
        self, x: Float[Array, "B Q D"], inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q S"] | None]:
        y = self._normed(self.pre_cross_attention_layer_norm, x, inputs)
        source = None
        if cache is not None:
            source = cache.source
        elif inputs.encoded is not None:
            source = self.cross_keys_values(inputs.encoded)
        if source is None:
            raise ValueError("A decoder needs the encoder's output, or a cache that holds what is needed of it.")
        return self.encoder_decoder_attention(
            y, source, bias=None, mask=inputs.cross_mask, deterministic=inputs.deterministic, devices=inputs.devices
        )  # fmt: skip

    def _compute(self, y: Float[Array, "B Q D"], inputs: LayerInputs) -> tuple[Float[Array, "B Q D"], tuple[RouterOutput, ...]]:
        """Runs the MLP, dense or sparse."""
        if not isinstance(self.mlp, SparseMLP):
            return self.mlp(y, deterministic=inputs.deterministic), ()
        y, router = self.mlp(y, **inputs.routing)
        return y, (router,)

    def _normed(self, norm: nn.Module, x: Float[Array, "B Q D"], inputs: LayerInputs) -> Float[Array, "B Q D"]:
        return zero_padding(norm(x), inputs.padding_mask, self.config)


def zero_padding(x: Float[Array, "B L D"], padding_mask: Bool[Array, "B L"] | None, config: SwitchConfig) -> Float[Array, "B L D"]:
    """Sets padding positions to zero where the config asks for it (flaxformer's logit mask)."""
    if padding_mask is None or not config.zero_padding_activations:
        return x
    return jnp.where(padding_mask[:, :, None], x, jnp.zeros((), x.dtype))


class ScanBlock(nn.Module):
    """The layers that repeat: dense ones and, where the stack is sparse, one sparse layer at the end."""

    config: SwitchConfig
    stack: StackConfig
    layer: type[nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], inputs: LayerInputs, with_hidden_states: bool
    ) -> tuple[Float[Array, "B Q D"], tuple[tuple[LayerOutput, Array | None], ...]]:
        outputs = []
        size = self.stack.block_size
        assert size is not None  # the config refuses to scan layers that do not repeat
        for j in range(size):
            layer: Any = self.layer
            x, output = layer(self.config, self.stack, sparse=j in self.stack.sparse_layers, name=f"subblock_{j}")(x, inputs)
            outputs.append((output, x if with_hidden_states else None))
        return x, tuple(outputs)


def remat(module: type[nn.Module], policy: str, *, in_parts: bool = False) -> type[nn.Module]:
    """Returns `module` with its activations recomputed in the backward pass, as the remat policy says.

    What experts on other devices sent is always kept: recomputing it would send it again. Where parameters lie in parts, what was
    gathered of them never is: it would be all layers' at once.
    """
    if policy == "none" and not in_parts:
        return module
    policies = jax.checkpoint_policies
    saved = policies.save_only_these_names(*EXCHANGED)
    if policy == "none":
        saved = keep_all_but_gathered
    elif policy == "minimal":
        saved = policies.save_from_both_policies(policies.checkpoint_dots_with_no_batch_dims, saved)
    # In a loop nothing can be taken from the forward pass; elsewhere XLA would, and keep what is to be computed again.
    scanned = module is ScanBlock
    return nn.remat(module, policy=saved, prevent_cse=not scanned, static_argnums=(3,) if scanned else ())
