"""Multi-head attention over keys and values given to it, and the relative position table."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_switch.config import SwitchConfig
from flax_switch.nn.cache import KeyValue, KeyValueCache, bias_table
from flax_switch.nn.layers import Initializer, Linear, scaled_init
from flax_switch.ops.attention import dot_product_attention, relative_position_bias
from flax_switch.ops.kernels.attention import cached_attention


class RelativePositionBias(nn.Module):
    """T5's table of relative position biases, [H, buckets]."""

    config: SwitchConfig
    bidirectional: bool

    def setup(self) -> None:
        config = self.config
        init: Initializer = nn.with_logical_partitioning(scaled_init(config, "fan_avg", "uniform"), ("heads", "relpos_buckets"))
        shape = (config.num_heads, config.relative_attention_num_buckets)
        self.rel_embedding = self.param("rel_embedding", init, shape, jnp.dtype(config.param_dtype))

    def __call__(self, query_length: int, key_length: int) -> Float[Array, "1 H Q T"]:
        return relative_position_bias(
            self.rel_embedding,
            query_length,
            key_length,
            bidirectional=self.bidirectional,
            max_distance=self.config.relative_attention_max_distance,
        )

    def for_cache(self, max_length: int) -> Float[Array, "H relative"]:
        """Returns the table that a cache of `max_length` places reads its biases from."""
        return bias_table(self.rel_embedding, max_length, self.config.relative_attention_max_distance)


class Attention(nn.Module):
    """Self- or cross-attention; kernels [D, H*K] and out [H*K, D]."""

    config: SwitchConfig

    def setup(self) -> None:
        config = self.config

        def linear(projection, features, axes, factor=1.0):
            weights = config.attention_weights(self.name or "", projection)
            return Linear(features, axes, scaled_init(config, factor=factor), config.dtype, config.param_dtype, weights)

        joined = config.num_heads * config.d_kv
        # Logits are not scaled by 1/sqrt(K); the queries' initialisation is.
        self.query = linear("query", joined, ("embed", "joined_kv"), factor=config.d_kv**-0.5)
        self.key = linear("key", joined, ("embed", "joined_kv"))
        self.value = linear("value", joined, ("embed", "joined_kv"))
        self.out = linear("out", config.d_model, ("joined_kv", "embed"))

    def _split(self, x: Float[Array, "B L HK"]) -> Float[Array, "B L H K"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.d_kv)

    def keys_values(self, x: Float[Array, "B T D"]) -> KeyValue:
        """Projects `x` to keys and values."""
        return KeyValue(self._split(self.key(x)), self._split(self.value(x)))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys_values: KeyValue | KeyValueCache,
        *,
        bias: Float[Array, "1 H Q T"] | None,
        mask: Bool[Array, "#G 1 #queries T"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q T"]]:
        """Attends from `x` to given keys and values; returns outputs and attention probabilities.

        Where `x` has a multiple n of the keys' batch (beams of one source), the n rows are more queries of that source, whose
        keys are not copied.
        """
        query = self._split(self.query(x))
        batch, length = query.shape[:2]
        if isinstance(keys_values, KeyValue) and keys_values.key.shape[0] != batch:
            keys_values = KeyValueCache.of(keys_values)
        if isinstance(keys_values, KeyValueCache):
            if not deterministic:
                raise ValueError("Decoding with a cache has no dropout; call it with deterministic=True.")
            output, probs = cached_attention(query, keys_values.key, keys_values.value, bias=bias, mask=mask)
            return self.out(output.reshape(batch, length, -1)), probs
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
        return self.out(output.reshape(batch, length, -1)), probs
