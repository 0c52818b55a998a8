"""One decoding step for one new token of each row: the decoder's layers over a cache laid out for it.

It computes what `SwitchTransformer.decode` computes for one token, from the same parameters, arranged once per call: relative
biases are a table, keys and values are kept as [.., H, K, T], rows that share a source (beams or samples) share its keys, and
sparse layers read only the experts that are hit.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.generation.device import Device
from flax_switch.generation.experts import Kernels, sparse_mlp
from flax_switch.nn.layers import Embedding, RMSNorm
from flax_switch.nn.outputs import DecoderCache
from flax_switch.ops.attention import relative_position_bias
from flax_switch.ops.kernels.attention import MASKED
from flax_switch.ops.mlp import mlp


@flax.struct.dataclass
class Cache:
    """Keys and values by layer. The T places of a group hold `beams` rows each; place t of row j is column t * beams + j."""

    key: tuple[Float[Array, "G H K T"], ...]
    value: tuple[Float[Array, "G H K T"], ...]
    length: Int[Array, ""]  # places filled


@flax.struct.dataclass
class Layer:
    """What a decoder layer needs from step to step."""

    query: Float[Array, "D HK"]
    key: Float[Array, "D HK"]
    value: Float[Array, "D HK"]
    out: Float[Array, "HK D"]
    cross_query: Float[Array, "D HK"]
    cross_out: Float[Array, "HK D"]
    cross_key: Float[Array, "B H K S"]
    cross_value: Float[Array, "B H K S"]
    bias: Float[Array, "H relative"]  # column T - 1 - d is the bias of the key d places before the query
    norms: Mapping[str, Any]
    mlp: Mapping[str, Any]  # kernels of a dense MLP, or parameters of a sparse one
    experts: tuple[Kernels, ...] | None  # of a sparse one, one by one
    extra_mlp: Mapping[str, Array] | None


@flax.struct.dataclass
class Decoder:
    """A decoder with everything that stays the same from step to step."""

    layers: tuple[Layer, ...]
    embedding: Float[Array, "V D"]
    head: Float[Array, "V D"] | Float[Array, "D V"]
    norm: Mapping[str, Any]
    source_mask: Bool[Array, "B S"]
    config: SwitchConfig = flax.struct.field(pytree_node=False)
    beams: int = flax.struct.field(pytree_node=False)  # rows whose past may be exchanged
    rows: int = flax.struct.field(pytree_node=False)  # R
    device: Device = flax.struct.field(pytree_node=False)


def prepare(
    params: Mapping[str, Any],
    experts: tuple[tuple[Kernels, ...], ...] | None,
    encoded: Float[Array, "B S D"],
    source_mask: Bool[Array, "B S"],
    config: SwitchConfig,
    *,
    max_length: int,
    rows: int,
    beams: int,
    device: Device,
) -> Decoder:
    """Arranges parameters and projects the source's keys and values. `max_length`: T, places of the cache."""
    stack = params["decoder"]
    sparse = config.sparse_indices("decoder")
    dtype = jnp.dtype(config.dtype)
    embedder = stack["token_embedder"] if config.separate_embeddings else params["token_embedder"]
    if config.tie_word_embeddings:
        head = params["token_embedder"]["embedding"].astype(jnp.float32)
    else:
        head = stack["logits_dense"]["kernel"].astype(jnp.float32)

    def kernels(mlp_params):
        return {name: leaf["kernel"].astype(dtype) for name, leaf in mlp_params.items()}

    def layer(i):
        params = stack[f"layers_{i}"]
        own, cross = params["self_attention"], params["encoder_decoder_attention"]
        relpos = params["relpos_bias"] if config.relative_attention_per_layer else stack["relpos_bias"]
        return Layer(
            query=own["query"]["kernel"].astype(dtype),
            key=own["key"]["kernel"].astype(dtype),
            value=own["value"]["kernel"].astype(dtype),
            out=own["out"]["kernel"].astype(dtype),
            cross_query=cross["query"]["kernel"].astype(dtype),
            cross_out=cross["out"]["kernel"].astype(dtype),
            cross_key=_heads_first(encoded.astype(dtype) @ cross["key"]["kernel"].astype(dtype), config),
            cross_value=_heads_first(encoded.astype(dtype) @ cross["value"]["kernel"].astype(dtype), config),
            bias=_bias_table(relpos["rel_embedding"], max_length, config),
            norms={name: leaf for name, leaf in params.items() if name.endswith("_layer_norm")},
            mlp=params["mlp"] if i in sparse else kernels(params["mlp"]),
            experts=None if i not in sparse or experts is None else experts[sparse.index(i)],
            extra_mlp=kernels(params["extra_mlp"]) if "extra_mlp" in params else None,
        )

    return Decoder(
        layers=tuple(layer(i) for i in range(config.num_decoder_layers)),
        embedding=embedder["embedding"],
        head=head,
        norm=stack["decoder_norm"],
        source_mask=source_mask,
        config=config,
        beams=beams,
        rows=rows,
        device=device,
    )


def _heads_first(x: Float[Array, "B S HK"], config: SwitchConfig) -> Float[Array, "B H K S"]:
    return _split_heads(x, config).transpose(0, 2, 3, 1)


def _bias_table(table: Float[Array, "H buckets"], max_length: int, config: SwitchConfig) -> Float[Array, "H relative"]:
    bias = relative_position_bias(
        table,
        1,
        max_length,
        bidirectional=False,
        max_distance=config.relative_attention_max_distance,
        query_offset=max_length - 1,
    )
    return jnp.pad(bias[0, :, 0], ((0, 0), (0, max_length)))  # the right half is for keys after the query, which are masked


def empty_cache(decoder: Decoder, max_length: int) -> Cache:
    """A cache with room for `max_length` tokens of each row."""
    config = decoder.config
    shape = (decoder.rows // decoder.beams, config.num_heads, config.d_kv, max_length * decoder.beams)
    layers = tuple(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in decoder.layers)
    return Cache(layers, layers, jnp.zeros((), jnp.int32))


def filled_cache(decoder: Decoder, prefix: DecoderCache, max_length: int) -> Cache:
    """A cache that continues what `SwitchTransformer.decode` left in its own, for one row of each source.

    Beams find the prefix at beam 0; samples get a copy each.
    """

    def spread(x: Float[Array, "B P H K"]) -> Float[Array, "G H K T"]:
        x = jnp.repeat(x.transpose(0, 2, 3, 1), decoder.rows // decoder.beams // x.shape[0], axis=0)
        columns = jnp.zeros((*x.shape, decoder.beams), x.dtype).at[..., 0].set(x).reshape(*x.shape[:3], -1)
        return jnp.pad(columns, ((0, 0), (0, 0), (0, 0), (0, max_length * decoder.beams - columns.shape[-1])))

    return Cache(
        tuple(spread(layer.self_attention.key) for layer in prefix.layers),
        tuple(spread(layer.self_attention.value) for layer in prefix.layers),
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
    config = decoder.config
    x: Any = Embedding(config).apply({"params": {"embedding": decoder.embedding}}, tokens)
    mask = _self_mask(decoder, cache, ancestors)
    keys, values = [], []
    for i, layer in enumerate(decoder.layers):
        y, key, value = _self_attention(decoder, i, _normed(decoder, layer, "pre_self_attention", x), cache, mask)
        x += y @ layer.out
        keys.append(key)
        values.append(value)
        y = _cross_attention(decoder, layer, _normed(decoder, layer, "pre_cross_attention", x))
        x += y @ layer.cross_out
        y = _normed(decoder, layer, "pre_mlp", x)
        if i in config.sparse_indices("decoder"):
            x += sparse_mlp(layer.mlp, layer.experts, y, config, decoder.device)
        else:
            x += _dense(decoder, layer.mlp, y)
        if layer.extra_mlp is not None:
            x += _dense(decoder, layer.extra_mlp, _normed(decoder, layer, "pre_extra_mlp", x))
    x = _rms_norm(decoder, decoder.norm, x)
    return _logits(decoder, x), Cache(tuple(keys), tuple(values), cache.length + 1)


def _normed(decoder: Decoder, layer: Layer, name: str, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    return _rms_norm(decoder, layer.norms[f"{name}_layer_norm"], x)


def _rms_norm(decoder: Decoder, params: Any, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    y: Any = RMSNorm(decoder.config).apply({"params": params}, x)
    return y


def _dense(decoder: Decoder, kernels: Mapping[str, Array], x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    return mlp(x, kernels, decoder.config.mlp_activations, jnp.matmul)


def _logits(decoder: Decoder, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """As the model's head: in float32, and scaled where it is the embeddings' transpose."""
    config = decoder.config
    x = x.astype(jnp.float32)
    if not config.tie_word_embeddings:
        return x @ decoder.head
    x = x * config.d_model**-0.5
    # A processor reads the embeddings where they lie when they are the left factor.
    return (decoder.head @ x.T).T if decoder.device is Device.PROCESSOR else x @ decoder.head.T


def _self_mask(decoder: Decoder, cache: Cache, ancestors: Int[Array, "R T"] | None) -> Bool[Array, "#G 1 #J TB"]:
    """Which columns of the cache each of a group's rows sees, the new token included."""
    beams = decoder.beams
    filled = jnp.arange(cache.key[0].shape[-1] // beams) <= cache.length
    if ancestors is None:
        return filled[None, None, None]
    ancestors = ancestors.reshape(-1, beams, ancestors.shape[-1])
    seen = jax.nn.one_hot(ancestors, beams, dtype=bool) & filled[None, None, :, None]
    return seen.reshape(*seen.shape[:2], -1)[:, None]


def _self_attention(decoder: Decoder, i: int, x: Float[Array, "R D"], cache: Cache, mask: Bool[Array, "#G 1 #J TB"]):
    config, beams, layer = decoder.config, decoder.beams, decoder.layers[i]
    query, key, value = (
        (x @ kernel).reshape(-1, beams, config.num_heads, config.d_kv) for kernel in (layer.query, layer.key, layer.value)
    )
    start = cache.length * beams
    key = jax.lax.dynamic_update_slice_in_dim(cache.key[i], key.transpose(0, 2, 3, 1), start, axis=3)
    value = jax.lax.dynamic_update_slice_in_dim(cache.value[i], value.transpose(0, 2, 3, 1), start, axis=3)
    max_length = key.shape[-1] // beams
    bias = jax.lax.dynamic_slice_in_dim(layer.bias, max_length - 1 - cache.length, max_length, axis=1)
    bias = jnp.repeat(bias, beams, axis=1)[None, :, None]  # [1, H, 1, T * beams]
    return _attend(query, key, value, bias, mask), key, value


def _cross_attention(decoder: Decoder, layer: Layer, x: Float[Array, "R D"]) -> Float[Array, "R HK"]:
    query = _split_heads(x @ layer.cross_query, decoder.config)
    query = query.reshape(decoder.source_mask.shape[0], -1, *query.shape[1:])
    return _attend(query, layer.cross_key, layer.cross_value, None, decoder.source_mask[:, None, None])


def _attend(
    query: Float[Array, "G J H K"],
    key: Float[Array, "G H K T"],
    value: Float[Array, "G H K T"],
    bias: Float[Array, "1 H 1 T"] | None,
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
