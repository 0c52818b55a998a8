"""What a `Pretrained` returns when it is called: outputs under Hugging Face's names, by attribute, key and position."""

from __future__ import annotations

import flax.struct
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.config.huggingface import SEMANTICS
from flax_switch.nn.fields import Fields
from flax_switch.nn.outputs import EncoderOutput, ModelOutput
from flax_switch.ops.losses import router_losses, seq2seq_loss
from flax_switch.ops.moe.routing import RouterOutput

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
