"""Models with the head of a task: over the decoder's states, as transformers' T5 classes compute them, or over the encoder's.

Parameters, beside the model's: `classification_head/{dense,out_proj}` (classification, regression), `classifier` (a class for each
token) or `qa_outputs` (start and end of a span), each with a kernel [D, outputs] and a bias.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.config.heads import LANGUAGE_MODEL, head_of, num_outputs
from flax_switch.nn.inputs import shift_right
from flax_switch.nn.layers import Dropout, Initializer, along_last, kernel_of, scaled_init
from flax_switch.nn.outputs import EncoderOutput, ModelOutput
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer, model_output
from flax_switch.ops import AnyArray
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.pooling import last_of, mean_of_tokens, normalized


class Dense(nn.Module):
    """x @ kernel + bias, in float32: it is small, and losses are made of it."""

    config: SwitchConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        config = self.config
        zeros: Initializer = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("unmodeled",))
        init: Initializer = scaled_init(config, distribution="truncated_normal")
        kernel = kernel_of(self, init, (x.shape[-1], self.features), ("embed", "unmodeled"), config.param_dtype, "float")
        bias = self.param("bias", zeros, (self.features,), jnp.dtype(config.param_dtype))
        product = project(x.astype(jnp.float32), kernel.astype(jnp.float32))
        return product + along_last(bias.astype(jnp.float32), product)


class ClassificationHead(nn.Module):
    """Dropout, a dense layer, tanh, dropout, and a layer to the outputs."""

    config: SwitchConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, deterministic: bool) -> Float[Array, "B outputs"]:
        drop = Dropout(self.config.classifier_dropout, broadcast_axes=())
        x = jnp.tanh(Dense(self.config, self.config.d_model, name="dense")(drop(x, deterministic=deterministic)))
        return Dense(self.config, num_outputs(self.config), name="out_proj")(drop(x, deterministic=deterministic))


class TaskEncoder(SwitchEncoder):
    """The encoder with a head: scores of classes for each token, or the mean of the states of a row's tokens, of length 1."""

    def setup(self) -> None:
        super().setup()
        if head_of(self.config).labelled:
            self.dropout = Dropout(self.config.classifier_dropout, broadcast_axes=())
            self.classifier = Dense(self.config, num_outputs(self.config))

    def __call__(
        self,
        input_ids: Int[AnyArray, "B S"],
        attention_mask: Int[AnyArray, "B S"] | Bool[AnyArray, "B S"] | None = None,
        *,
        deterministic: bool = True,
        **options: Any,
    ) -> ModelOutput:
        """Returns logits [B, S, labels] or, with head="embedding", as `logits` embeddings [B, D]; options as for `encode`."""
        encoded = self.encode(input_ids, attention_mask, deterministic=deterministic, **options)
        states = encoded.last_hidden_state
        if head_of(self.config).labelled:
            logits = self.classifier(self.dropout(states.astype(jnp.float32), deterministic=deterministic))
        else:
            logits = normalized(mean_of_tokens(states, attention_mask))
        return _output(encoded, logits)


class TaskTransformer(SwitchTransformer):
    """The encoder-decoder with a head over the decoder's states; the decoder reads the inputs again, shifted right.

    A text is classified by the state at its last EOS; of a span the start and the end have a score at each position of the inputs.
    """

    head: bool = False

    def setup(self) -> None:
        super().setup()
        if self.config.head == "question_answering":
            self.qa_outputs = Dense(self.config, num_outputs(self.config))
        else:
            self.classification_head = ClassificationHead(self.config)

    def __call__(
        self,
        input_ids: Int[AnyArray, "B S"],
        attention_mask: Int[AnyArray, "B S"] | Bool[AnyArray, "B S"] | None = None,
        *,
        deterministic: bool = True,
        **options: Any,
    ) -> ModelOutput:
        """Returns logits: [B, labels], [B, 1] of a regression, or of spans [B, S, 2]; options as for `encode`.

        A row to classify has an EOS; one without has the state at its first position.
        """
        config, options = self.config, {"deterministic": deterministic, **options}
        encoded = self.encode(input_ids, attention_mask, **options)
        # Padding takes no expert's slot, where that counts; what causal attention sees is as transformers has it: every position.
        padding = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        decoded = self.decode(
            shift_right(input_ids, config), encoded.last_hidden_state, attention_mask, decoder_padding_mask=padding, **options
        )
        states = decoded.last_hidden_state
        if config.head == "question_answering":
            return dataclasses.replace(model_output(encoded, decoded), logits=self.qa_outputs(states))
        ends = jnp.asarray(input_ids) == config.eos_token_id
        logits = self.classification_head(last_of(states, ends), deterministic=deterministic)
        return dataclasses.replace(model_output(encoded, decoded), logits=logits)


def _output(encoded: EncoderOutput, logits: Array) -> ModelOutput:
    return ModelOutput(
        logits=logits,
        decoder_last_hidden_state=None,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_router=encoded.router,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


def build_model(config: SwitchConfig, architecture: str = "full", **fields: Any) -> SwitchEncoder:
    """Returns the model of a config with the head that it names; of a language model also "headless" or the "encoder" alone."""
    if config.head != LANGUAGE_MODEL:
        return (TaskTransformer if head_of(config).reads_decoder else TaskEncoder)(config, **fields)
    if architecture == "encoder":
        return SwitchEncoder(config, **fields)
    return SwitchTransformer(config, head=architecture == "full", **fields)
