"""The training loss: cross-entropy with z-loss and label smoothing, plus the routers' losses, added up in one place."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig, check
from flax_switch.ops import AnyArray
from flax_switch.ops.ids import check_ids
from flax_switch.ops.kernels.head_loss import Head, HeadLosses, Known, Terms, head_loss, token_cross_entropy
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
    teacher: Head | Known | None = None,
    teacher_weight: float = 0.0,
) -> LossOutput:
    """Returns the loss of a `ModelOutput`: cross-entropy + z-loss + coefficients times the routers' losses.

    Args:
      output: what `SwitchTransformer` returned; without logits (`output_logits=False`) they are made here, where they are many in
        chunks, and of the result `loss` alone has gradients.
      labels: target ids; -100 marks positions that do not count. Others outside the vocabulary raise, where they have values.
      config: gives z_loss_coef, label_smoothing, loss_normalizer and the routers' coefficients.
      segment_ids: of packed targets; only loss_normalizer="average_per_sequence" needs them.
      divisor: what the weighted sum is divided by, where this is a part of a larger batch; by default this batch's own.
      teacher: for an output without logits, what a teacher's are made of, or what is known of its probabilities: a share of
        `teacher_weight` of the cross-entropy is taken against these. z-loss and the routers' losses stay, and so does
        `cross_entropy`: what is reported is the true tokens'. No gradient reaches it.
    """
    check(
        hasattr(output, "encoder_router") and hasattr(output, "logits"),
        f"output must be what SwitchTransformer's apply returns; this is a {type(output).__name__}. A loaded model that is called "
        "with labels has its loss already: .loss.",
    )
    check_ids("labels", labels, config.vocab_size if output.logits is None else output.logits.shape[-1], besides=IGNORED_LABEL)
    labels = jnp.asarray(labels)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    weights = (labels != IGNORED_LABEL).astype(jnp.float32)
    weight_sum = weights.sum()
    weights, own_divisor = loss_weights(weights, config.loss_normalizer, segment_ids)
    divisor = jnp.maximum(own_divisor if divisor is None else divisor, 1e-9)  # a batch without a single target costs 0
    weights /= divisor
    terms = Terms(config.z_loss_coef, config.label_smoothing, teacher_weight)
    losses = _target_losses(output, jnp.where(labels == IGNORED_LABEL, 0, labels), weights, terms, teacher)
    cross_entropy, z_loss = (losses.cross_entropy * weights).sum(), (losses.z_loss * weights).sum()
    balance, router_z = router_losses(output.encoder_router, output.decoder_router, config)
    loss = losses.loss + config.load_balancing_loss_coef * balance + config.router_z_loss_coef * router_z
    return LossOutput(loss, cross_entropy, z_loss, balance, router_z, weight_sum)


def _target_losses(
    output: Any, targets: Int[Array, "B L"], weights: Float[Array, "B L"], terms: Terms, teacher: Head | Known | None
) -> HeadLosses:
    """Returns the losses of targets, of logits or of the head that makes them."""
    if output.logits is None:
        return head_loss(output.head, targets, weights, terms, teacher=teacher)
    options = {"z_loss": terms.z_loss, "label_smoothing": terms.label_smoothing}
    cross_entropy, z_loss = token_cross_entropy(output.logits, targets, **options)
    return HeadLosses((cross_entropy * weights).sum() + (z_loss * weights).sum(), cross_entropy, z_loss, None)
