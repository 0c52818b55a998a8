"""The training loss: cross-entropy with z-loss and label smoothing, plus the routers' losses, added up in one place."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig, check
from flax_switch.ops import AnyArray
from flax_switch.ops.ids import check_ids
from flax_switch.ops.moe.routing import RouterOutput

IGNORED_LABEL = -100  # labels that do not count, as in Hugging Face


@flax.struct.dataclass
class LossOutput:
    """A training loss and its parts, all float32 scalars in nats.

    `loss` is what is differentiated. `cross_entropy` and `z_loss` are divided by the normaliser (by default the number of real
    target tokens, `weight_sum`); `load_balancing_loss` and `router_z_loss` are reduced by `router_losses`, before
    their coefficients.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    weight_sum: Float[Array, ""]


def token_cross_entropy(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Returns cross-entropy of each token, and its z-loss (z_loss * logsumexp(logits)**2); both in float32.

    With label smoothing the entropy of the smoothed target is subtracted, so that a perfect prediction costs 0. Source: T5X.
    """
    logits = logits.astype(jnp.float32)  # sums over V lose too much in bfloat16
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_z - target_logit
    if label_smoothing:
        V = logits.shape[-1]
        on, off = 1.0 - label_smoothing, label_smoothing / (V - 1)
        cross_entropy = log_z - (on - off) * target_logit - off * logits.sum(-1)
        cross_entropy += on * jnp.log(on) + (V - 1) * off * jnp.log(off + 1e-20)
    return cross_entropy, z_loss * jnp.square(log_z)


def loss_weights(
    weights: Float[Array, "B L"], normalizer: str | float | None, segment_ids: Int[Array, "B L"] | None = None
) -> tuple[Float[Array, "B L"], Float[Array, ""]]:
    """Returns token weights and the number the weighted sum is divided by, for each of T5X's loss normalisers.

    `normalizer` is "real_target_tokens", "total_target_tokens", "average_per_sequence" (every sequence, or packed segment,
    counts the same), a constant, or None (no division).
    """
    if normalizer == "real_target_tokens":
        return weights, weights.sum()
    if normalizer == "total_target_tokens":
        return weights, jnp.float32(weights.size)
    if normalizer == "average_per_sequence":
        if segment_ids is None:
            length = weights.sum(-1, keepdims=True)
        else:
            same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
            length = jnp.einsum("BLM,BM->BL", same_segment.astype(weights.dtype), weights)
        weights = jnp.where(length > 0, weights / jnp.maximum(length, 1e-9), 0.0)
        return weights, weights.sum()
    return weights, jnp.float32(1.0 if normalizer is None else normalizer)


def router_losses(
    encoder: tuple[RouterOutput, ...], decoder: tuple[RouterOutput, ...], config: SwitchConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns load-balancing loss and router z-loss of a model, before their coefficients; 0 where no router learns.

    "layers": the means over all sparse layers (flaxformer). "huggingface": the sum over the two stacks, each with its layers'
    tokens taken together before the fraction routed is multiplied by the mean probability, sequence by sequence; a stack whose
    every layer is sparse counts nothing there.
    """
    routers = (*encoder, *decoder)
    if not routers or not config.learned_router:
        return jnp.float32(0.0), jnp.float32(0.0)
    if config.router_loss_reduction == "layers":
        balance = jnp.stack([r.load_balancing_loss for r in routers]).mean()
        return balance, jnp.stack([r.z_loss for r in routers]).mean()
    balance, router_z = jnp.float32(0.0), jnp.float32(0.0)
    for stack, routers in zip((config.encoder, config.decoder), (encoder, decoder), strict=True):
        if not routers or len(routers) == stack.num_layers:
            continue
        fraction = jnp.stack([r.expert_fraction for r in routers]).mean(0)
        probs = jnp.stack([r.mean_probs for r in routers]).mean(0)
        balance += config.num_experts**2 * (fraction * probs).mean()
        router_z += jnp.stack([r.z_loss for r in routers]).mean()
    return balance, router_z


def seq2seq_loss(
    output: Any,
    labels: Int[AnyArray, "B L"],
    config: SwitchConfig,
    *,
    segment_ids: Int[AnyArray, "B L"] | None = None,
    divisor: Float[Array, ""] | None = None,
) -> LossOutput:
    """Returns the loss of a `ModelOutput`: cross-entropy + z-loss + coefficients times the routers' losses.

    Args:
      output: what `SwitchTransformer` returned.
      labels: target ids; -100 marks positions that do not count. Others outside the vocabulary raise, where they have values.
      config: gives z_loss_coef, label_smoothing, loss_normalizer and the routers' coefficients.
      segment_ids: of packed targets; only loss_normalizer="average_per_sequence" needs them.
      divisor: what the weighted sum is divided by, where this is a part of a larger batch; by default this batch's own.
    """
    check(
        hasattr(output, "encoder_router") and hasattr(output, "logits"),
        f"output must be what SwitchTransformer's apply returns; this is a {type(output).__name__}. A loaded model that is called "
        "with labels has its loss already: .loss.",
    )
    check_ids("labels", labels, output.logits.shape[-1], besides=IGNORED_LABEL)
    labels = jnp.asarray(labels)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    weights = (labels != IGNORED_LABEL).astype(jnp.float32)
    cross_entropy, z_loss = token_cross_entropy(
        output.logits,
        jnp.where(labels == IGNORED_LABEL, 0, labels),
        z_loss=config.z_loss_coef,
        label_smoothing=config.label_smoothing,
    )
    weight_sum = weights.sum()
    weights, own_divisor = loss_weights(weights, config.loss_normalizer, segment_ids)
    divisor = jnp.maximum(own_divisor if divisor is None else divisor, 1e-9)  # a batch without a single target costs 0
    cross_entropy = (cross_entropy * weights).sum() / divisor
    z_loss = (z_loss * weights).sum() / divisor
    balance, router_z = router_losses(output.encoder_router, output.decoder_router, config)
    loss = cross_entropy + z_loss + config.load_balancing_loss_coef * balance + config.router_z_loss_coef * router_z
    return LossOutput(loss, cross_entropy, z_loss, balance, router_z, weight_sum)
