"""What the model returns."""

import flax.struct
from jaxtyping import Array, Float

from flax_switch.nn.cache import DecoderCache, LayerCache
from flax_switch.nn.fields import Fields
from flax_switch.ops.kernels.head_loss import Head
from flax_switch.ops.moe.routing import RouterOutput


@flax.struct.dataclass
class LayerOutput:
    """What a layer returns beside its hidden states; None where there is nothing, or it was not asked for."""

    routers: tuple[RouterOutput, ...] = ()
    self_attention: Float[Array, "B H Q T"] | None = None
    cross_attention: Float[Array, "B H Q S"] | None = None
    cache: LayerCache | None = None


@flax.struct.dataclass
class EncoderOutput(Fields):
    """The encoder's output. `router` has one entry per sparse layer, in order.

    `hidden_states` (embeddings, then the output of every layer, the last one normalised) and `attentions` are None unless asked
    for.
    """

    last_hidden_state: Float[Array, "B L D"]
    router: tuple[RouterOutput, ...] = ()
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@flax.struct.dataclass
class DecoderOutput(Fields):
    """The decoder's output; `logits` are float32, or None where `head` is there. `cache` is the updated one, if one was given."""

    logits: Float[Array, "B L V"] | None
    last_hidden_state: Float[Array, "B L D"]
    router: tuple[RouterOutput, ...] = ()
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    cache: DecoderCache | None = None
    head: Head | None = None


@flax.struct.dataclass
class ModelOutput(Fields):
    """Output of a model; what is an encoder's is None, or empty, where there is none.

    Axes: B batch, L target length (S source length), D model, V vocabulary. With the head of a task (`nn/heads`) `logits` are its
    outputs: [B, V] or [B, S, V] for V labels. With `output_logits=False` they are None, and `head` is what makes them.

    `encoder_router` and `decoder_router` hold a `RouterOutput` per sparse layer, in order; their `logits` are there with
    `output_router_logits=True`. Hidden states and attentions of every layer are None unless asked for.
    """

    logits: Float[Array, "B *L V"] | None
    decoder_last_hidden_state: Float[Array, "B L D"] | None
    encoder_last_hidden_state: Float[Array, "B S D"] | None = None
    encoder_router: tuple[RouterOutput, ...] = ()
    decoder_router: tuple[RouterOutput, ...] = ()
    encoder_hidden_states: tuple[Array, ...] | None = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    head: Head | None = None
