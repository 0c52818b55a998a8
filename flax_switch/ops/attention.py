"""T5's attention: no scaling of logits, additive relative position biases, softmax in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.ops.dropout import keep_mask
from flax_switch.ops.kernels.attention import attend
from flax_switch.ops.kernels.fused_attention import fused_attention, fuses
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible
from flax_switch.parallel.mesh import partition_spec
from flax_switch.parallel.placement import ONE_DEVICE, LaidOutByCompiler, OnMesh, Placement


def self_attention_mask(
    config: SwitchConfig,
    mask: Bool[Array, "B L"] | None,
    segment_ids: Int[Array, "B L"] | None,
    *,
    causal: bool = False,
    prefix_mask: Bool[Array, "B L"] | None = None,
) -> Visible:
    """Returns who attends to whom in teacher-forced self-attention.

    Where the config zeroes padding, padded queries attend to nothing (flaxformer); else they attend like others (Hugging Face).
    """
    query_mask = mask if config.zero_padding_activations else None
    return Visible(query_mask, mask, prefix_mask if causal else None, segment_ids, segment_ids, causal=causal)


def cross_attention_mask(
    config: SwitchConfig,
    target_mask: Bool[Array, "B L"] | None,
    source_mask: Bool[Array, "sources S"] | None,
    target_segments: Int[Array, "B L"] | None,
    source_segments: Int[Array, "sources S"] | None,
    cached: bool,
) -> Visible:
    """Returns which source positions a target position may attend to."""
    query_mask = target_mask if config.zero_padding_activations and not cached else None
    return Visible(query_mask, source_mask, None, target_segments, source_segments)


def mask_for(
    config: SwitchConfig,
    visible: Visible,
    queries: Float[Array, "B Q D"],
    keys: Float[Array, "sources T D"] | None,
    *,
    with_probs: bool,
) -> Visible | Bool[Array, "#G 1 #queries T"] | None:
    """Returns a mask for the form of attention that the config asks for: as it is for the fused one, else as an array.

    queries, keys: what they are projected from; None, or fewer rows than there are of queries, are keys laid out for few queries,
      and like probabilities that are wanted they call for the plain form.
    """
    (rows, length), (sources, key_length) = queries.shape[:2], (0, 0) if keys is None else keys.shape[:2]
    if not with_probs and rows == sources and fuses(config.attention_implementation, length, key_length):
        return visible
    return visible.array(length, key_length)


def rotate(x: Float[Array, "B L H K"], first: Int[Array, ""] | int) -> Float[Array, "B L H K"]:
    """Turns pairs of features (i, i + K/2) of the tokens at places `first` and following by place / 10000**(2i / K) (2104.09864).

    Products of queries and keys then depend on the distance of their places alone.
    """
    K = x.shape[-1]
    frequency = 10000.0 ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    place = (first + jnp.arange(x.shape[1])).astype(jnp.float32)
    angle = place[None, :, None, None] * frequency[None, None, None]  # [1, L, 1, K/2]
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B T #H K"],
    value: Float[Array, "B T #H K"],
    *,
    bias: RelativeBias | Float[Array, "#B #H Q T"] | None = None,
    mask: Visible | Bool[Array, "#B 1 #Q T"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    devices: Placement = ONE_DEVICE,
) -> tuple[Float[Array, "B Q H K"], Float[Array, "B H Q T"] | None]:
    """Returns attention outputs, and the probabilities before dropout (float32). Keys and values of one head are all heads'.

    With a mask that is not laid out it is the fused form that runs, with a bias that is not either, and without probabilities.

    Logits are not divided by sqrt(K): T5 folds that into the initialisation of the queries. Dropout, when `dropout_rng` is
    given, drops a key for all queries of a head at once (broadcast over Q, as flaxformer's).
    """
    # Heads before positions: XLA's CPU backend takes twice the time for the order it would choose itself.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    key, value = (jnp.broadcast_to(x, (x.shape[0], query.shape[1], *x.shape[2:])) for x in (key, value))
    keep = None
    if dropout_rng is not None and dropout_rate > 0.0:
        B, H, T, _ = key.shape
        kept = keep_mask(dropout_rng, dropout_rate, (B, H, 1, T))
        keep = kept.astype(value.dtype) / (1.0 - dropout_rate)
    if isinstance(mask, Visible):
        assert bias is None or isinstance(bias, RelativeBias)
        output, probs = _fused(devices, query, key, value, bias, mask, keep), None
    else:
        assert not isinstance(bias, RelativeBias)
        output, probs = attend(query, key, value, bias, mask, keep)
    return output.transpose(0, 2, 1, 3), probs


def _fused(
    devices: Placement,
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    bias: RelativeBias | None,
    visible: Visible,
    keep: Float[Array, "B H 1 T"] | None,
) -> Float[Array, "B H Q K"]:
    """Runs the fused form; over a mesh each device has its rows and heads, as XLA cannot split kernels that it did not make."""
    arrays = (query, key, value, bias, visible, keep)
    if isinstance(devices, LaidOutByCompiler):
        return fused_attention(*arrays, implementation="blocks")
    if not isinstance(devices, OnMesh):
        return fused_attention(*arrays)

    def split(*axes: str | None) -> Callable[[Array], PartitionSpec]:
        return lambda x: partition_spec(axes[: x.ndim], x.shape, devices.mesh)

    rows = split("batch", "heads", None, None)
    rules = (rows, rows, rows, split("heads", None), split("batch", None), rows)
    specs = tuple(jax.tree.map(rule, x) for rule, x in zip(rules, arrays, strict=True))
    # As for experts (`ops/moe/expert_parallel`), check_vma would ask loops and custom gradients over which axes they vary.
    return jax.shard_map(fused_attention, mesh=devices.mesh, in_specs=specs, out_specs=rows(query), check_vma=False)(*arrays)
