"""What a `Pretrained` returns when it is called: outputs under Hugging Face's names, by attribute, key and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig, check
from flax_switch.config.huggingface import SEMANTICS
from flax_switch.nn.fields import Fields
from flax_switch.nn.inputs import as_array
from flax_switch.nn.outputs import EncoderOutput, ModelOutput
from flax_switch.ops import AnyArray
from flax_switch.ops.ids import is_known
from flax_switch.ops.losses import IGNORED_LABEL, router_losses, seq2seq_loss
from flax_switch.ops.moe.routing import RouterOutput
from flax_switch.ops.task_losses import as_bits, task_loss

Layers = tuple[Array, ...] | None  # an array for each layer, None where not asked for


@flax.struct.dataclass
class EncoderModelOutput(Fields):
    """`SwitchTransformersEncoderModel`'s output."""

    last_hidden_state: Float[Array, "B L D"]
    hidden_states: Layers = None
    attentions: Layers = None
    router_logits: Layers = None


@flax.struct.dataclass
class Seq2SeqModelOutput(Fields):
    """`SwitchTransformersModel`'s output, without its cache (past_key_values before transformers 5.24)."""

    last_hidden_state: Float[Array, "B L D"]
    decoder_hidden_states: Layers = None
    decoder_attentions: Layers = None
    cross_attentions: Layers = None
    decoder_router_logits: Layers = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: Layers = None
    encoder_attentions: Layers = None
    encoder_router_logits: Layers = None


@flax.struct.dataclass
class Seq2SeqLMOutput(Fields):
    """`SwitchTransformersForConditionalGeneration`'s output, without its cache (past_key_values before transformers 5.24).

    `loss` is there with labels; the four router losses with output_router_logits, which also adds them to the loss.
    """

    loss: Float[Array, ""] | None
    logits: Float[Array, "B L V"]
    encoder_z_loss: Float[Array, ""] | None = None
    encoder_aux_loss: Float[Array, ""] | None = None
    decoder_z_loss: Float[Array, ""] | None = None
    decoder_aux_loss: Float[Array, ""] | None = None
    decoder_hidden_states: Layers = None
    decoder_attentions: Layers = None
    cross_attentions: Layers = None
    decoder_router_logits: Layers = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: Layers = None
    encoder_attentions: Layers = None
    encoder_router_logits: Layers = None


def encoder_output(output: EncoderOutput) -> EncoderModelOutput:
    """Returns an encoder's output under Hugging Face's names."""
    return EncoderModelOutput(output.last_hidden_state, output.hidden_states, output.attentions, _router_logits(output.router))


def model_output(output: ModelOutput) -> Seq2SeqModelOutput:
    """Returns the output without the head's logits, under Hugging Face's names."""
    assert output.decoder_last_hidden_state is not None  # which a model with a decoder has
    return Seq2SeqModelOutput(last_hidden_state=output.decoder_last_hidden_state, **_states(output))


def lm_output(
    output: ModelOutput, labels: Int[Array, "B L"] | None, config: SwitchConfig, output_router_logits: bool
) -> Seq2SeqLMOutput:
    """Returns the output under Hugging Face's names, with Hugging Face's loss where there are labels.

    The loss is the mean cross-entropy of the labels that are not -100; with `output_router_logits` the routers' losses of
    both stacks are added, each stack's layers concatenated on the length axis, times the config's coefficients.
    """
    # There is no decoder alone there, and so no way in which it adds up its layers' losses.
    semantics = {name: value for name, value in SEMANTICS.items() if not config.decoder_only or name != "router_loss_reduction"}
    config = config.replace(**semantics, loss_normalizer="real_target_tokens")
    losses = {}
    if output_router_logits:
        for stack in [stack.name for stack in config.stacks]:
            routers = {"encoder": (), "decoder": (), stack: getattr(output, f"{stack}_router")}
            losses[f"{stack}_aux_loss"], losses[f"{stack}_z_loss"] = router_losses(**routers, config=config)
    else:
        config = config.replace(load_balancing_loss_coef=0.0, router_z_loss_coef=0.0)
    loss = None if labels is None else seq2seq_loss(output, labels, config).loss
    assert output.logits is not None  # a headless model's output is `model_output`
    return Seq2SeqLMOutput(loss=loss, logits=output.logits, **losses, **_states(output))


@flax.struct.dataclass
class TaskOutput(Fields):
    """What a model with the head of a task returns; `loss` is there with labels. Other fields are named as in `Seq2SeqLMOutput`.

    `logits` are [B, labels], [B, 1] of a regression, [B, S, labels] for tokens, [B, S, 2] for spans, of which `start_logits` and
    `end_logits` are the two; with head="embedding" vectors [B, D].
    """

    loss: Float[Array, ""] | None
    logits: Array
    start_logits: Float[Array, "B S"] | None = None
    end_logits: Float[Array, "B S"] | None = None
    decoder_last_hidden_state: Array | None = None
    decoder_hidden_states: Layers = None
    decoder_attentions: Layers = None
    cross_attentions: Layers = None
    decoder_router_logits: Layers = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: Layers = None
    encoder_attentions: Layers = None
    encoder_router_logits: Layers = None


def task_output(output: ModelOutput, labels: Any, config: SwitchConfig, output_router_logits: bool) -> TaskOutput:
    """Returns the output of a model with a task's head, with the loss that transformers has where there are labels."""
    logits, spans = output.logits, {}
    assert logits is not None  # the head's
    if config.head == "question_answering":
        spans = dict(start_logits=logits[..., 0], end_logits=logits[..., 1])
    loss = None
    if labels is not None:
        config = config.replace(**SEMANTICS, loss_normalizer="real_target_tokens")
        if not output_router_logits:
            config = config.replace(load_balancing_loss_coef=0.0, router_z_loss_coef=0.0)
        loss = task_loss(output, as_task_labels(labels, logits.shape, config), config).loss
    return TaskOutput(
        loss=loss, logits=logits, decoder_last_hidden_state=output.decoder_last_hidden_state, **spans, **_states(output)
    )


def as_task_labels(labels: Any, shape: Sequence[int], config: SwitchConfig) -> AnyArray:
    """Returns labels as `task_loss` takes them; raises `ConfigError` naming what is wrong with them."""
    B = shape[0]
    each = {"token_classification": (B, *shape[1:2]), "question_answering": (B, 2), "multi_label_classification": tuple(shape)}
    wanted = each.get(config.head, (B, 1))
    check(
        config.head != "embedding", "A model for embeddings has no labels; its loss is of pairs of texts, see docs/embeddings.md."
    )
    found = as_array("labels", labels)
    found = found[:, None] if found.ndim == 1 and wanted == (B, 1) else found
    check(
        found.shape == wanted,
        f"labels must have the shape {list(wanted)} with head={config.head!r}; it is {list(np.shape(labels))}.",
    )
    if config.head == "regression":
        return as_bits(found.astype(np.float32))
    if config.head == "multi_label_classification":  # transformers wants them as floats
        right = not is_known(found) or bool(np.isin(np.asarray(found), (0, 1, IGNORED_LABEL)).all())
        check(right, f"labels must hold 0 or 1 for each class with head={config.head!r}.")
        return found.astype(np.int32)
    check(np.issubdtype(found.dtype, np.integer), f"labels must hold numbers of classes, integers; their dtype is {found.dtype}.")
    if config.head == "question_answering":  # a position past the end is none, as in transformers
        return jnp.where((jnp.asarray(found) < 0) | (jnp.asarray(found) >= shape[1]), IGNORED_LABEL, jnp.asarray(found))
    names = f"the {len(config.labels)} classes {', '.join(config.labels[:8])}"
    if is_known(found):
        bad = np.asarray(found)[
            (np.asarray(found) != IGNORED_LABEL) & ((np.asarray(found) < 0) | (np.asarray(found) >= len(config.labels)))
        ]
        check(bad.size == 0, f"labels holds {bad.flat[0] if bad.size else 0}, which is none of {names}.")
    return found.astype(np.int32)


def _states(output: ModelOutput) -> dict:
    return dict(
        decoder_hidden_states=output.decoder_hidden_states,
        decoder_attentions=output.decoder_attentions,
        cross_attentions=output.cross_attentions,
        decoder_router_logits=_router_logits(output.decoder_router),
        encoder_last_hidden_state=output.encoder_last_hidden_state,
        encoder_hidden_states=output.encoder_hidden_states,
        encoder_attentions=output.encoder_attentions,
        encoder_router_logits=_router_logits(output.encoder_router),
    )


def _router_logits(routers: tuple[RouterOutput, ...]) -> Layers:
    logits = tuple(router.logits for router in routers if router.logits is not None)
    return logits or None
