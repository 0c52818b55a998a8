"""Losses of tasks' heads: cross-entropy of classes, tags and spans, squared error, contrastive loss; the routers' are added."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.ops import AnyArray
from flax_switch.ops.losses import IGNORED_LABEL, LossOutput, loss_weights, router_losses, token_cross_entropy

_FAR = -1e9  # of scores that are not to count


def task_loss(output, labels: AnyArray, config: SwitchConfig, *, divisor: Float[Array, ""] | None = None) -> LossOutput:
    """Returns the loss of the output of a model with a task's head: its task's, and coefficients times the routers' losses.

    Args:
      output: a `ModelOutput`; its logits are [B, labels], [B, 1] (regression), [B, S, labels] or [B, S, 2] (start and end of a
        span), or, for embeddings, vectors [2B, D] of length 1: of each row its text, and then its positive.
      labels: whole numbers, -100 where none counts: classes [B, 1]; with several classes a text 0 or 1 for each [B, labels];
        classes of tokens [B, S]; first and last token of a span [B, 2]; of a regression the bits of float32 numbers [B, 1]
        (`as_bits`), of which -100 would be no number; of embeddings the ids [B, T] of the positive, by which equal ones are known.
      config: gives the head, label_smoothing, z_loss_coef, loss_normalizer, contrastive_temperature and the routers' coefficients.
      divisor: as for `seq2seq_loss`.
    """
    labels, z_loss = jnp.asarray(labels), jnp.zeros((), jnp.float32)
    if config.head == "embedding":
        losses, weights = contrastive_losses(output.logits, labels, config.contrastive_temperature)
        divisor = None
    elif config.head == "regression":
        weights = (labels != IGNORED_LABEL).astype(jnp.float32)
        wanted = jnp.where(labels == IGNORED_LABEL, 0.0, jax.lax.bitcast_convert_type(labels, jnp.float32))
        losses = jnp.square(output.logits - wanted)
    elif config.head == "multi_label_classification":
        weights = (labels != IGNORED_LABEL).astype(jnp.float32)
        losses = jax.nn.softplus(output.logits) - output.logits * labels.clip(0, 1)
    else:
        logits = {"classification": lambda x: x[:, None], "question_answering": lambda x: x.swapaxes(1, 2)}
        weights = (labels != IGNORED_LABEL).astype(jnp.float32)
        losses, z_loss = token_cross_entropy(
            logits.get(config.head, lambda x: x)(output.logits),
            jnp.where(labels == IGNORED_LABEL, 0, labels),
            z_loss=config.z_loss_coef,
            label_smoothing=config.label_smoothing,
        )
    count = weights.sum()
    weights, own = loss_weights(weights, config.loss_normalizer)
    divisor = jnp.maximum(own if divisor is None else divisor, 1e-9)
    loss, z_loss = (losses * weights).sum() / divisor, (z_loss * weights).sum() / divisor
    balance, router_z = router_losses(output.encoder_router, output.decoder_router, config)
    total = loss + z_loss + config.load_balancing_loss_coef * balance + config.router_z_loss_coef * router_z
    return LossOutput(total, loss, z_loss, balance, router_z, count)


def contrastive_losses(
    vectors: Float[Array, "M D"], positives: Int[Array, "B T"], temperature: float
) -> tuple[Float[Array, "B 1"], Float[Array, "B 1"]]:
    """Returns InfoNCE of each row (1807.03748) and its weight: of all positives of the batch, its text is to find its own.

    positives: their ids. Rows without one (-100 throughout) have weight 0 and are nobody's negatives; nor is one that
    has the ids of the row's own positive.
    """
    text, positive = vectors.reshape(len(positives), 2, -1).swapaxes(0, 1)
    real = (positives != IGNORED_LABEL).any(1)
    same = (positives[:, None] == positives[None]).all(-1) & ~jnp.eye(len(positives), dtype=bool)
    scores = jnp.einsum("BD,CD->BC", text, positive) / temperature
    scores = jnp.where(same | ~real[None], _FAR, scores)
    losses = jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)
    return jnp.where(real, losses, 0.0)[:, None], real.astype(jnp.float32)[:, None]


def as_bits(numbers: Float[AnyArray, "*B"]) -> Int[Array, "*B"]:
    """Returns the bits of numbers as float32, as the labels of a regression are held."""
    return jax.lax.bitcast_convert_type(jnp.asarray(numbers, jnp.float32), jnp.int32)
