"""Multi-head attention with an explicit key/value cache, and the relative position table."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.nn.layers import Initializer, Linear, scaled_init
from flax_switch.ops.attention import dot_product_attention, relative_position_bias


@flax.struct.dataclass
class KeyValue:
    """Keys and values of one attention, [B, T, H, K] each."""

    key: Float[Array, "B T H K"]
    value: Float[Array, "B T H K"]


class RelativePositionBias(nn.Module):
    """T5's table of relative position biases, [H, buckets]."""

    config: SwitchConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, query_length: int, key_length: int, query_offset: Int[Array, ""] | int = 0) -> Float[Array, "1 H Q T"]:
        config = self.config
        init: Initializer = nn.with_logical_partitioning(scaled_init(config, "fan_avg", "uniform"), ("heads", "relpos_buckets"))
        shape = (config.num_heads, config.relative_attention_num_buckets)
        table = self.param("rel_embedding", init, shape, jnp.dtype(config.param_dtype))
        return relative_position_bias(
            table,
            query_length,
            key_length,
            bidirectional=self.bidirectional,
            max_distance=config.relative_attention_max_distance,
            query_offset=query_offset,
        )


class Attention(nn.Module):
    """Self- or cross-attention; kernels [D, H*K] and out [H*K, D]."""

    config: SwitchConfig

    def setup(self) -> None:
        config = self.config

        def linear(features, axes, factor=1.0):
            return Linear(features, axes, scaled_init(config, factor=factor), config.dtype, config.param_dtype)

        joined = config.num_heads * config.d_kv
        # Logits are not scaled by 1/sqrt(K); the queries' initialisation is.
        self.query = linear(joined, ("embed", "joined_kv"), factor=config.d_kv**-0.5)
        self.key = linear(joined, ("embed", "joined_kv"))
        self.value = linear(joined, ("embed", "joined_kv"))
        self.out = linear(config.d_model, ("joined_kv", "embed"))

    def _split(self, x: Float[Array, "B L HK"]) -> Float[Array, "B L H K"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.d_kv)

    def keys_values(self, x: Float[Array, "B T D"]) -> KeyValue:
        """Projects `x` to keys and values."""
        return KeyValue(self._split(self.key(x)), self._split(self.value(x)))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys_values: KeyValue,
        *,
        bias: Float[Array, "#B H Q T"] | None,
        mask: Bool[Array, "#sources 1 #Q T"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q T"]]:
        """Attends from `x` to given keys and values; returns outputs and attention probabilities.

        Where `x` has a multiple n of the keys' batch (beams of one source), the n rows are read as more queries of that
        source, so that its keys are not copied; such calls take no bias, and a mask that is the same for all queries.
        """
        query = self._split(self.query(x))
        batch, length = query.shape[:2]
        sources = keys_values.key.shape[0]
        if sources != batch:
            query = query.reshape(sources, batch // sources * length, *query.shape[2:])
        rng = None
        if not deterministic and self.config.dropout_rate > 0.0:
            rng = self.make_rng("dropout")
        output, probs = dot_product_attention(
            query,
            keys_values.key,
            keys_values.value,
            bias=bias,
            mask=mask,
            dropout_rate=self.config.dropout_rate,
            dropout_rng=rng,
        )
        if sources != batch:
            probs = probs.reshape(sources, probs.shape[1], batch // sources, length, -1)
            probs = jnp.swapaxes(probs, 1, 2).reshape(batch, -1, length, probs.shape[-1])
        return self.out(output.reshape(batch, length, -1)), probs


def write_cache(cache: KeyValue, new: KeyValue, index: Int[Array, ""] | int) -> KeyValue:
    """`cache` with `new` written from position `index` on."""
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), index, axis=1), cache, new)
