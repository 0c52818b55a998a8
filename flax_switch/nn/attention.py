"""Multi-head attention over keys and values given to it, and the relative position table."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.nn.cache import KeyValue, KeyValueCache, bias_table
from flax_switch.nn.layers import Initializer, Linear, scaled_init
from flax_switch.ops import Size
from flax_switch.ops.attention import dot_product_attention, rotate
from flax_switch.ops.kernels.attention import cached_attention
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible
from flax_switch.parallel.placement import ONE_DEVICE, Placement

Mask = Visible | Bool[Array, "#G 1 #queries T"] | None  # which keys queries see; `Visible` asks for the fused form of attention


class RelativePositionBias(nn.Module):
    """T5's table of relative position biases, [H, buckets]."""

    config: SwitchConfig
    bidirectional: bool

    def setup(self) -> None:
        config = self.config
        init: Initializer = nn.with_logical_partitioning(scaled_init(config, "fan_avg", "uniform"), ("heads", "relpos_buckets"))
        shape = (config.num_heads, config.relative_attention_num_buckets)
        self.rel_embedding = self.param("rel_embedding", init, shape, jnp.dtype(config.param_dtype))

    def __call__(self, length: Size, mask: Mask) -> RelativeBias | Float[Array, "1 H L L"]:
        """Returns the biases of a sequence for attention with `mask`: where that is not laid out, the table."""
        bias = RelativeBias(self.rel_embedding, self.bidirectional, self.config.relative_attention_max_distance)
        return bias if isinstance(mask, Visible) else bias.array(length, length)

    def for_cache(self, max_length: Size) -> Float[Array, "H relative"]:
        """Returns the table that a cache of `max_length` places reads its biases from."""
        return bias_table(self.rel_embedding, max_length, self.config.relative_attention_max_distance)


class Attention(nn.Module):
    """Self- or cross-attention; kernels [D, H*K] and out [H*K, D], with biases where the config has them."""

    config: SwitchConfig

    def setup(self) -> None:
        config = self.config

        def linear(projection, features, axes, factor=1.0):
            weights = config.attention_weights(self.name or "", projection)
            init = scaled_init(config, factor=factor)
            return Linear(features, axes, init, config.dtype, config.param_dtype, weights, config.use_bias)

        joined = config.num_heads * config.d_kv
        # Where logits are not scaled by 1/sqrt(K), the queries' initialisation is.
        self.query = linear("query", joined, ("embed", "joined_kv"), factor=query_factor(config))
        self.key = linear("key", joined, ("embed", "joined_kv"))
        self.value = linear("value", joined, ("embed", "joined_kv"))
        self.out = linear("out", config.d_model, ("joined_kv", "embed"))

    def _split(self, x: Float[Array, "B L HK"]) -> Float[Array, "B L H K"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.d_kv)

    def keys_values(self, x: Float[Array, "B T D"], first: Int[Array, ""] | int = 0) -> KeyValue:
        """Projects `x`, whose first token is at place `first`, to keys and values."""
        return KeyValue(placed(self._split(self.key(x)), first, self.config), self._split(self.value(x)))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys_values: KeyValue | KeyValueCache,
        *,
        bias: RelativeBias | Float[Array, "1 H Q T"] | None,
        mask: Mask,
        deterministic: bool,
        first: Int[Array, ""] | int = 0,
        devices: Placement = ONE_DEVICE,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B H Q T"] | None]:
        """Attends from `x` to given keys and values; returns outputs and attention probabilities. See `attend`."""
        query = placed(self._split(self.query(x)), first, self.config)
        rng = (lambda: self.make_rng("dropout")) if not deterministic else None
        output, probs = attend(query, keys_values, self.config, bias=bias, mask=mask, make_rng=rng, devices=devices)
        return self.out(output.reshape(*output.shape[:2], -1)), probs


def query_factor(config: SwitchConfig) -> float:
    """Returns the factor of the queries' initialisation: 1/sqrt(K) where logits are not scaled by it."""
    return 1.0 if config.scale_attention_logits else config.d_kv**-0.5


def placed(x: Float[Array, "B L H K"], first: Int[Array, ""] | int, config: SwitchConfig) -> Float[Array, "B L H K"]:
    """Returns queries or keys of the tokens from place `first` on, turned where the config has rotary positions."""
    return rotate(x, first) if config.positions == "rotary" else x


def attend(
    query: Float[Array, "B Q H K"],
    keys_values: KeyValue | KeyValueCache,
    config: SwitchConfig,
    *,
    bias: RelativeBias | Float[Array, "1 H Q T"] | None,
    mask: Mask,
    make_rng: Callable[[], Array] | None,
    devices: Placement = ONE_DEVICE,
) -> tuple[Float[Array, "B Q H K"], Float[Array, "B H Q T"] | None]:
    """Returns outputs and probabilities of attention; `make_rng` gives the generator of dropout, and is None in evaluation.

    The fused form has no probabilities.

    Where queries have a multiple n of the keys' batch (beams of one source), the n rows are more queries of that source, whose keys
    are not copied.
    """
    if config.scale_attention_logits:
        query = query * config.d_kv**-0.5
    if isinstance(keys_values, KeyValue) and keys_values.key.shape[0] != query.shape[0]:
        keys_values = KeyValueCache.of(keys_values)
    if isinstance(keys_values, KeyValueCache):
        if make_rng is not None:
            raise ValueError("Decoding with a cache has no dropout; call it with deterministic=True.")
        assert not isinstance(mask, Visible) and not isinstance(bias, RelativeBias)  # nothing is fused with a cache
        return cached_attention(query, keys_values.key, keys_values.value, bias=bias, mask=mask)
    rate = config.attention_dropout
    rng = None if make_rng is None or rate == 0.0 else make_rng()
    key, value = keys_values.key, keys_values.value
    return dot_product_attention(
        query, key, value, bias=bias, mask=mask, dropout_rate=rate, dropout_rng=rng, devices=devices
    )  # fmt: skip
