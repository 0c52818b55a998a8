"""One decoding step for one new token of each row: the decoder's layers over a cache laid out for it.

It computes what `SwitchTransformer.decode` computes for one token, from the same parameters, arranged once per call:
projections of queries, keys and values are one product, relative biases are a table, keys and values are kept as [.., H, K, T],
rows that share a source (beams or samples) share its keys, and sparse layers read only the experts that are hit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.generation.experts import Kernels, sparse_mlp
from flax_switch.nn.layers import MLP, Embedding, Linear, RMSNorm
from flax_switch.nn.outputs import DecoderCache
from flax_switch.ops.attention import MASKED, relative_position_bias


@flax.struct.dataclass
class Cache:
    """Keys and values by layer. The T places of a group hold `beams` rows each; place t of row j is column t * beams + j."""

    key: tuple[Float[Array, "G H K T"], ...]
    value: tuple[Float[Array, "G H K T"], ...]
    length: Int[Array, ""]  # places filled


@flax.struct.dataclass
class Decoder:
    """A decoder with everything that stays the same from step to step."""

    params: Mapping[str, Any]
    experts: tuple[tuple[Kernels, ...], ...] | None  # by sparse layer and expert
    qkv: tuple[Float[Array, "D 3 J"], ...]  # by layer, J = H * K
    biases: tuple[Float[Array, "H 2T"], ...]  # by layer; column T - 1 + d is the bias of the key d places before the query
    cross_key: tuple[Float[Array, "B H K S"], ...]
    cross_value: tuple[Float[Array, "B H K S"], ...]
    source_mask: Bool[Array, "B S"]
    config: SwitchConfig = flax.struct.field(pytree_node=False)
    beams: int = flax.struct.field(pytree_node=False)  # rows whose past may be exchanged
    sharded: bool = flax.struct.field(pytree_node=False)


def prepare(
    params: Mapping[str, Any],
    experts: tuple[tuple[Kernels, ...], ...] | None,
    encoded: Float[Array, "B S D"],
    source_mask: Bool[Array, "B S"],
    config: SwitchConfig,
    *,
    max_length: int,
    beams: int,
    sharded: bool,
) -> Decoder:
    """Arranges parameters and projects the source's keys and values. `max_length`: T, places of the cache."""
    stack = params["decoder"]
    layers = [stack[f"layers_{i}"] for i in range(config.num_decoder_layers)]
    dtype = jnp.dtype(config.dtype)

    def joined(layer):
        kernels = [layer["self_attention"][name]["kernel"].astype(dtype) for name in ("query", "key", "value")]
        return jnp.stack(kernels, axis=1)

    def bias_table(layer):
        table = layer["relpos_bias"] if config.relative_attention_per_layer else stack["relpos_bias"]
        bias = relative_position_bias(
            table["rel_embedding"],
            1,
            max_length,
            bidirectional=False,
            max_distance=config.relative_attention_max_distance,
            query_offset=max_length - 1,
        )
        # Columns T-1.. belong to keys after the query, which are masked.
        return jnp.pad(bias[0, :, 0], ((0, 0), (0, max_length)))

    def cross(layer, name):
        projected = encoded.astype(dtype) @ layer["encoder_decoder_attention"][name]["kernel"].astype(dtype)
        return _split_heads(projected, config).transpose(0, 2, 3, 1)

    tables = [bias_table(layer) for layer in (layers if config.relative_attention_per_layer else layers[:1])]
    return Decoder(
        params=params,
        experts=experts,
        qkv=tuple(joined(layer) for layer in layers),
        biases=tuple(tables if config.relative_attention_per_layer else tables * len(layers)),
        cross_key=tuple(cross(layer, "key") for layer in layers),
        cross_value=tuple(cross(layer, "value") for layer in layers),
        source_mask=source_mask,
        config=config,
        beams=beams,
        sharded=sharded,
    )


def empty_cache(decoder: Decoder, rows: int, max_length: int) -> Cache:
    """A cache for `rows` rows with room for `max_length` tokens each."""
    config = decoder.config
    shape = (rows // decoder.beams, config.num_heads, config.d_kv, max_length * decoder.beams)
    layers = tuple(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(config.num_decoder_layers))
    return Cache(layers, layers, jnp.zeros((), jnp.int32))


def filled_cache(decoder: Decoder, prefix: DecoderCache, rows: int, max_length: int) -> Cache:
    """A cache that continues what `SwitchTransformer.decode` left in its own, for one row of each source.

    Beams find the prefix at beam 0; samples get a copy each.
    """

    def lay_out(x: Float[Array, "B P H K"]) -> Float[Array, "G H K T"]:
        groups = rows // decoder.beams
        x = jnp.repeat(x.transpose(0, 2, 3, 1), groups // x.shape[0], axis=0)
        spread = jnp.zeros((*x.shape, decoder.beams), x.dtype).at[..., 0].set(x)
        spread = spread.reshape(*x.shape[:3], -1)
        return jnp.pad(spread, ((0, 0), (0, 0), (0, 0), (0, max_length * decoder.beams - spread.shape[-1])))

    return Cache(
        tuple(lay_out(layer.self_attention.key) for layer in prefix.layers),
        tuple(lay_out(layer.self_attention.value) for layer in prefix.layers),
        prefix.index,
    )


def decode_step(
    decoder: Decoder, tokens: Int[Array, " R"], cache: Cache, ancestors: Int[Array, "R T"] | None = None
) -> tuple[Float[Array, "R V"], Cache]:
    """Logits (float32) after one more token of each row, and the cache with it.

    Args:
      tokens: the newest token of each row.
      cache: of the tokens before it.
      ancestors: with beams, whose keys a row reads at each place: the number, within its source, of the row that held its past
        there. Exchanging beams changes these numbers instead of moving the cache.
    """
    config, params = decoder.config, decoder.params
    stack = params["decoder"]
    embedder = stack["token_embedder"] if config.separate_embeddings else params["token_embedder"]
    x = Embedding(config).apply({"params": embedder}, tokens)
    mask = _self_mask(decoder, cache, ancestors)
    sparse = config.sparse_indices("decoder")
    keys, values = [], []
    for i in range(config.num_decoder_layers):
        layer = stack[f"layers_{i}"]

        def normed(name, x, layer=layer):
            return RMSNorm(config).apply({"params": layer[name]}, x)

        y, key, value = _self_attention(decoder, i, normed("pre_self_attention_layer_norm", x), cache, mask)
        x += _project(layer["self_attention"]["out"], y, config)
        keys.append(key)
        values.append(value)
        y = _cross_attention(decoder, i, normed("pre_cross_attention_layer_norm", x))
        x += _project(layer["encoder_decoder_attention"]["out"], y, config)
        y = normed("pre_mlp_layer_norm", x)
        if i in sparse:
            experts = None if decoder.experts is None else decoder.experts[sparse.index(i)]
            x += sparse_mlp(layer["mlp"], experts, y, config, sharded=decoder.sharded)
            if config.extra_mlp:
                x += _dense(layer["extra_mlp"], normed("pre_extra_mlp_layer_norm", x), config)
        else:
            x += _dense(layer["mlp"], y, config)
    x = RMSNorm(config).apply({"params": stack["decoder_norm"]}, x)
    return _logits(params, x, config), Cache(tuple(keys), tuple(values), cache.length + 1)


def _self_mask(decoder: Decoder, cache: Cache, ancestors: Int[Array, "R T"] | None) -> Bool[Array, "#G 1 #J TB"]:
    """Which columns of the cache each of a group's rows sees, the new token included."""
    beams = decoder.beams
    filled = jnp.arange(cache.key[0].shape[-1] // beams) <= cache.length
    if ancestors is None:
        return filled[None, None, None]
    ancestors = ancestors.reshape(-1, beams, ancestors.shape[-1])
    seen = (ancestors[..., None] == jnp.arange(beams)) & filled[:, None]
    return seen.reshape(*seen.shape[:2], -1)[:, None]


def _self_attention(decoder: Decoder, i: int, x: Float[Array, "R D"], cache: Cache, mask: Bool[Array, "#G 1 #J TB"]):
    config, beams = decoder.config, decoder.beams
    D, _, J = decoder.qkv[i].shape
    projected = (x @ decoder.qkv[i].reshape(D, 3 * J)).reshape(-1, beams, 3, config.num_heads, config.d_kv)
    query, key, value = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
    start = cache.length * beams
    key = jax.lax.dynamic_update_slice_in_dim(cache.key[i], key.transpose(0, 2, 3, 1), start, axis=3)
    value = jax.lax.dynamic_update_slice_in_dim(cache.value[i], value.transpose(0, 2, 3, 1), start, axis=3)
    max_length = key.shape[-1] // beams
    bias = jax.lax.dynamic_slice_in_dim(decoder.biases[i], max_length - 1 - cache.length, max_length, axis=1)
    bias = jnp.repeat(bias, beams, axis=1)[:, None]  # [H, 1, T * beams]
    return _attend(query, key, value, bias, mask), key, value


def _cross_attention(decoder: Decoder, i: int, x: Float[Array, "R D"]) -> Float[Array, "R J"]:
    config = decoder.config
    layer = decoder.params["decoder"][f"layers_{i}"]["encoder_decoder_attention"]
    query = _split_heads(_project(layer["query"], x, config), config)
    query = query.reshape(decoder.source_mask.shape[0], -1, *query.shape[1:])
    mask = decoder.source_mask[:, None, None]
    return _attend(query, decoder.cross_key[i], decoder.cross_value[i], None, mask)


def _attend(
    query: Float[Array, "G J H K"],
    key: Float[Array, "G H K T"],
    value: Float[Array, "G H K T"],
    bias: Float[Array, "H 1 T"] | None,
    mask: Bool[Array, "#G 1 #J T"],
) -> Float[Array, "R HK"]:
    """`ops.attention.dot_product_attention` of the G * J = R queries, on keys and values laid out for products of few rows."""
    logits = jnp.einsum("GJHK,GHKT->GHJT", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    probs = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    output = jnp.einsum("GHJT,GHKT->GJHK", probs.astype(value.dtype), value)
    return output.reshape(-1, output.shape[2] * output.shape[3])


def _split_heads(x: Float[Array, "*B HK"], config: SwitchConfig) -> Float[Array, "*B H K"]:
    return x.reshape(*x.shape[:-1], config.num_heads, config.d_kv)


def _project(params: Mapping[str, Array], x: Float[Array, "R D"], config: SwitchConfig) -> Float[Array, "R F"]:
    kernel = params["kernel"].astype(config.dtype)
    return x @ kernel


def _dense(params: Mapping[str, Any], x: Float[Array, "R D"], config: SwitchConfig) -> Float[Array, "R D"]:
    return MLP(config).apply({"params": params}, x[:, None], deterministic=True)[:, 0]


def _logits(params: Mapping[str, Any], x: Float[Array, "R D"], config: SwitchConfig) -> Float[Array, "R V"]:
    if config.tie_word_embeddings:
        return Embedding(config).apply({"params": params["token_embedder"]}, x, method="attend")
    kernel = params["decoder"]["logits_dense"]["kernel"]
    return Linear(kernel.shape[1], ("embed", "vocab"), None, "float32", config.param_dtype).apply({"params": {"kernel": kernel}}, x)
