"""The models: `SwitchTransformer`, an encoder-decoder or a decoder with a language-model head, and `SwitchEncoder`, the encoder."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import StackConfig, SwitchConfig, check, expect
from flax_switch.nn.cache import DecoderCache, KeyValueCache, LayerCache
from flax_switch.nn.layer import LayerInputs
from flax_switch.nn.layers import Embedding, HeadKernel
from flax_switch.nn.outputs import DecoderOutput, EncoderOutput, LayerOutput, ModelOutput
from flax_switch.nn.stack import Stack
from flax_switch.ops import AnyArray, Size
from flax_switch.ops.attention import cross_attention_mask, mask_for, self_attention_mask
from flax_switch.ops.kernels.head_loss import Head
from flax_switch.ops.positions import numbered, sinusoids
from flax_switch.parallel.placement import ONE_DEVICE, Placement


class SwitchEncoder(nn.Module):
    """The encoder with its token embeddings.

    Parameters: `token_embedder/embedding [V, D]` and `encoder/...`, named as in T5X checkpoints. devices: where the program that
    applies the model runs, `parallel.placement.placed_on(mesh)` for one that jit lays over a mesh.
    """

    config: SwitchConfig
    devices: Placement = dataclasses.field(default=ONE_DEVICE, kw_only=True)

    if TYPE_CHECKING:  # Flax's own says Any or a tuple, whatever is asked for

        @overload
        def apply(
            self, variables: Mapping[str, Any], *args: Any, method: None = None, mutable: Literal[False] = False, **kwargs: Any
        ) -> EncoderOutput: ...
        @overload
        def apply(self, variables: Mapping[str, Any], *args: Any, method: str | Callable[..., Any], **kwargs: Any) -> Any: ...
        @overload
        def apply(self, variables: Mapping[str, Any], *args: Any, mutable: bool | str | list[str], **kwargs: Any) -> Any: ...
        def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any: ...

    def setup(self) -> None:
        expect("config", self.config, SwitchConfig, "Give one such as fs.PRESETS['switch-tiny'] or fs.SwitchConfig(d_model=256).")
        check(
            not self.config.decoder_only or isinstance(self, SwitchTransformer),
            "A model with architecture='decoder_only' has no encoder; take fs.SwitchTransformer(config).",
        )
        if not self.config.decoder_only:
            self.token_embedder = Embedding(self.config)
            self.encoder = Stack(self.config, self.config.encoder, self.devices.in_parts)

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initialises variables as plain arrays; `init_boxed` keeps the names of their axes."""
        return nn.unbox(self.init_boxed(*args, **kwargs))

    @nn.nowrap
    def init_boxed(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns variables whose leaves carry their logical axis names (`nn.LogicallyPartitioned`)."""
        return dict(super().init(*args, **kwargs))

    def encode(
        self,
        input_ids: Int[AnyArray, "B L"] | None = None,
        attention_mask: Int[AnyArray, "B L"] | Bool[AnyArray, "B L"] | None = None,
        *,
        inputs_embeds: Float[AnyArray, "B L D"] | None = None,
        segment_ids: Int[AnyArray, "B L"] | None = None,
        deterministic: bool = True,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Encodes token ids (or embeddings given in their place).

        Args:
          attention_mask: 1 at tokens, 0 at padding; None means no padding.
          segment_ids: of packed examples; attention stays within a segment. Relative positions need no restart.
          deterministic: False turns on dropout and jitter (rngs "dropout" and "jitter") and takes the training capacity.
        """
        check(not self.config.decoder_only, "A model with architecture='decoder_only' has no encoder; call .decode.")
        segments = _as_array(segment_ids)
        x = self._embed(self.encoder, input_ids, inputs_embeds, segments)
        mask = _as_mask(attention_mask)
        _check_mask("attention_mask", mask, x)
        inputs = LayerInputs(
            bias=None,
            mask=mask_for(self.config, self_attention_mask(self.config, mask, segments), x, x, with_probs=output_attentions),
            padding_mask=mask,
            token_ids=self._token_ids(self.config.encoder, input_ids),
            deterministic=deterministic,
            output_router_logits=output_router_logits,
            output_attentions=output_attentions,
            devices=self.devices,
        )
        x, outputs, hidden_states = self.encoder(x, inputs, output_hidden_states=output_hidden_states)
        return EncoderOutput(
            last_hidden_state=x,
            router=tuple(router for o in outputs for router in o.routers),
            hidden_states=hidden_states,
            attentions=_weights(outputs, "self_attention") if output_attentions else None,
        )

    def _embed(
        self,
        stack: Stack,
        ids: Int[AnyArray, "B L"] | None,
        embeds: Float[AnyArray, "B L D"] | None,
        segments: Int[Array, "B L"] | None,
        first: Int[Array, "#B 1"] | Int[Array, ""] | int = 0,
    ) -> Float[Array, "B L D"]:
        """Returns the embeddings that were given, or those of ids, with their positions where these are added.

        pad_token_id has no position. The encoder does not count it either, so that inputs may be padded on the left; a decoder
        does, as every step of it takes a place of the cache. first: how many places rows have before these.
        """
        x = self._embeddings(stack, ids, embeds)
        if self.config.positions != "sinusoidal":
            return x
        pad, every = self.config.pad_token_id, jnp.ones(x.shape[:2], bool)
        tokens = every if ids is None or embeds is not None else jnp.asarray(ids) != pad
        number = numbered(every if stack.stack.causal else tokens, segments, first)
        positions = sinusoids(jnp.where(tokens, number, 0), self.config.d_model, offset=pad)
        return (x.astype(jnp.float32) + positions).astype(x.dtype)

    def _embeddings(
        self, stack: Stack, ids: Int[AnyArray, "B L"] | None, embeds: Float[AnyArray, "B L D"] | None
    ) -> Float[Array, "B L D"]:
        if embeds is not None:
            return jnp.asarray(embeds).astype(self.config.dtype)
        if ids is None:
            raise ValueError(f"The {stack.stack.name} needs token ids, or embeddings in their place; neither was given.")
        ids = jnp.asarray(ids)
        check(
            ids.ndim == 2 and jnp.issubdtype(ids.dtype, jnp.integer),
            f"The {stack.stack.name} takes ids as integers [rows, tokens]; these are {ids.dtype}{list(ids.shape)}.",
        )
        if self.config.decoder_only:
            return stack.token_embedder(ids)
        shared = self.token_embedder(ids)
        # With tables of their own the shared one serves nothing, but stays a parameter: Hugging Face's files hold it.
        return stack.token_embedder(ids) if self.config.separate_embeddings else shared

    def _token_ids(self, stack: StackConfig, ids: Int[AnyArray, "B L"] | None) -> Int[Array, "B L"] | None:
        """Returns the ids that sparse layers are routed by; None where they are routed by what they compute."""
        if self.config.learned_router or not stack.sparse_layers:
            return None
        if ids is None:
            raise ValueError(
                f"router_type='hash' routes tokens by their ids, which embeddings do not have; give the {stack.name} ids as well."
            )
        return jnp.asarray(ids)

    def __call__(self, input_ids=None, attention_mask=None, **options) -> EncoderOutput:
        """Returns the same as `encode`."""
        return self.encode(input_ids, attention_mask, **options)


class SwitchTransformer(SwitchEncoder):
    """The encoder-decoder, or a decoder alone, with its head, tied to the embeddings or of its own.

    Parameters: the encoder's, `decoder/...` and, untied, `decoder/logits_dense/kernel [D, V]`. With `head=False` there is no head
    and `logits` are None, as in Hugging Face's SwitchTransformersModel. With `architecture="decoder_only"` all is in `decoder/...`,
    embeddings too, and a call takes one sequence, as `input_ids` or `decoder_input_ids`.
    """

    head: bool = True

    if TYPE_CHECKING:  # Flax's own says Any or a tuple, whatever is asked for

        @overload
        def apply(
            self, variables: Mapping[str, Any], *args: Any, method: None = None, mutable: Literal[False] = False, **kwargs: Any
        ) -> ModelOutput: ...
        @overload
        def apply(self, variables: Mapping[str, Any], *args: Any, method: str | Callable[..., Any], **kwargs: Any) -> Any: ...
        @overload
        def apply(self, variables: Mapping[str, Any], *args: Any, mutable: bool | str | list[str], **kwargs: Any) -> Any: ...
        def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any: ...

    def setup(self) -> None:
        super().setup()
        self.decoder = Decoder(self.config, self.config.decoder, self.devices.in_parts)

    def decode(
        self,
        decoder_input_ids: Int[AnyArray, "B L"] | None,
        encoded: Float[AnyArray, "B S D"] | None,
        attention_mask: Int[AnyArray, "sources S"] | Bool[AnyArray, "sources S"] | None = None,
        decoder_attention_mask: Int[AnyArray, "B T"] | Bool[AnyArray, "B T"] | None = None,
        *,
        cache: DecoderCache | None = None,
        decoder_inputs_embeds: Float[AnyArray, "B L D"] | None = None,
        decoder_padding_mask: Bool[AnyArray, "B L"] | None = None,
        prefix_mask: Int[AnyArray, "B L"] | Bool[AnyArray, "B L"] | None = None,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        decoder_segment_ids: Int[AnyArray, "B L"] | None = None,
        causal: bool = True,
        deterministic: bool = True,
        output_logits: bool = True,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        """Decodes against the encoder's output, or what a decoder-only model is given alone.

        Args:
          encoded: the encoder's last hidden state; None with a cache, which holds what is needed of it.
          prefix_mask: without a cache, positions (of each segment) that see each other; None means that none sees a later one.
          causal: with a cache, False lets the tokens of this call see each other.
          attention_mask: of the source.
          decoder_attention_mask: which target positions may be attended to; with a cache, over all its positions [B, T], and
            None means those filled so far.
          cache: from `init_cache`; the tokens continue at its index, and the output carries the updated cache.
          output_logits: False returns, in their place, `head`, of which a loss makes them a chunk at a time.
          decoder_padding_mask: which of these positions hold tokens, for routing and zeroing; by default what
            decoder_attention_mask says without a cache, and all of them with one.
        """
        config = self.config
        source_segments, target_segments, encoded = map(_as_array, (segment_ids, decoder_segment_ids, encoded))
        past = 0 if cache is None else cache.tokens
        x = self._embed(self.decoder, decoder_input_ids, decoder_inputs_embeds, target_segments, past)
        mask, source_mask, padding_mask = map(_as_mask, (decoder_attention_mask, attention_mask, decoder_padding_mask))
        if cache is None:
            _check_mask("decoder_attention_mask", mask, x)
            padding_mask = mask if padding_mask is None else padding_mask
            _check_mask("prefix_mask", prefix := _as_mask(prefix_mask), x)
            seen = self_attention_mask(config, mask, target_segments, causal=True, prefix_mask=prefix)
            self_mask = mask_for(config, seen, x, x, with_probs=output_attentions)
        else:
            self_mask = cache.visible(mask, x.shape[1], causal=causal)
        seen = cross_attention_mask(config, mask, source_mask, target_segments, source_segments, cache is not None)
        inputs = LayerInputs(
            bias=None,
            mask=self_mask,
            padding_mask=padding_mask,
            token_ids=self._token_ids(self.config.decoder, decoder_input_ids),
            encoded=encoded,
            cross_mask=mask_for(config, seen, x, encoded, with_probs=output_attentions or cache is not None),
            cache_index=0 if cache is None else cache.index,
            deterministic=deterministic,
            output_router_logits=output_router_logits,
            output_attentions=output_attentions,
            devices=self.devices,
        )
        x, outputs, hidden_states = self.decoder(x, inputs, cache=cache, output_hidden_states=output_hidden_states)
        cache = None if cache is None else cache.advanced(tuple(o.cache for o in outputs if o.cache is not None), x.shape[1])
        head = self._head(x) if self.head else None
        return DecoderOutput(
            logits=head.logits() if head is not None and output_logits else None,
            head=None if output_logits else head,
            last_hidden_state=x,
            router=tuple(router for o in outputs for router in o.routers),
            hidden_states=hidden_states,
            attentions=_weights(outputs, "self_attention") if output_attentions else None,
            cross_attentions=_weights(outputs, "cross_attention") if output_attentions else None,
            cache=cache,
        )

    def _head(self, x: Float[Array, "B L D"]) -> Head:
        """Returns the head over some states: a kernel of its own or the embeddings, scaled if it is tied."""
        config = self.config
        tied = config.tie_word_embeddings and not config.copied_head
        scale = config.head_scale if config.tie_word_embeddings else 1.0
        owner = self.decoder if config.decoder_only else self
        kernel = owner.token_embedder.table() if tied else self.decoder.logits_dense()
        return Head(x, kernel, config.vocab_size, scale, tied, self.devices)

    def init_cache(
        self, encoded: Float[Array, "B S D"] | Size, max_length: Size, rows_per_source: int = 1, *, beams: int = 1
    ) -> DecoderCache:
        """Returns an empty cache for `max_length` tokens of B * rows_per_source rows, with the source's keys computed.

        encoded: the encoder's output; of a decoder-only model B. beams: rows of a source, neighbours, whose past may be exchanged
        by `DecoderCache.ancestors`; divides rows_per_source.
        """
        config = self.config
        check(
            isinstance(encoded, Size) == config.decoder_only,
            "encoded is the encoder's output; a decoder-only model has none, and takes the number of rows.",
        )
        sources = encoded if isinstance(encoded, Size) else encoded.shape[0]
        shape = (sources * rows_per_source // beams, config.key_heads, config.d_kv, max_length * beams)
        past = KeyValueCache.empty(*shape, jnp.dtype(config.dtype))
        if isinstance(encoded, Size):
            layers = (LayerCache(past),) * config.decoder.num_layers
        else:
            layers = tuple(LayerCache(past, KeyValueCache.of(cross)) for cross in self.decoder.cross_keys_values(encoded))
        return DecoderCache(layers, self.decoder.bias_tables(max_length), jnp.zeros((), jnp.int32), beams=beams)

    def __call__(
        self,
        input_ids: Int[AnyArray, "B S"] | None = None,
        decoder_input_ids: Int[AnyArray, "B L"] | None = None,
        attention_mask: Int[AnyArray, "B S"] | Bool[AnyArray, "B S"] | None = None,
        decoder_attention_mask: Int[AnyArray, "B L"] | Bool[AnyArray, "B L"] | None = None,
        *,
        inputs_embeds: Float[AnyArray, "B S D"] | None = None,
        decoder_inputs_embeds: Float[AnyArray, "B L D"] | None = None,
        encoder_output: EncoderOutput | None = None,
        decoder_padding_mask: Bool[AnyArray, "B L"] | None = None,
        prefix_mask: Int[AnyArray, "B L"] | Bool[AnyArray, "B L"] | None = None,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        decoder_segment_ids: Int[AnyArray, "B L"] | None = None,
        deterministic: bool = True,
        output_logits: bool = True,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Encodes the source (unless `encoder_output` is given) and decodes the target; see `encode`, `decode`.

        A decoder-only model has one sequence, which may be given as source or as target.
        """
        options: dict[str, Any] = dict(
            deterministic=deterministic,
            output_router_logits=output_router_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.config.decoder_only:
            target = (decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, decoder_segment_ids)
            given = _one_sequence((input_ids, attention_mask, inputs_embeds, segment_ids), target, encoder_output)
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, decoder_segment_ids = given
            attention_mask = segment_ids = None
        elif encoder_output is None:
            encoder_output = self.encode(input_ids, attention_mask, inputs_embeds=inputs_embeds, segment_ids=segment_ids, **options)
        if encoder_output is not None:
            _check_rows(encoder_output, decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds)
        decoded = self.decode(
            decoder_input_ids,
            None if encoder_output is None else encoder_output.last_hidden_state,
            attention_mask,
            decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_padding_mask=decoder_padding_mask,
            prefix_mask=prefix_mask,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            output_logits=output_logits,
            **options,
        )
        return model_output(encoder_output, decoded)


def model_output(encoded: EncoderOutput | None, decoded: DecoderOutput) -> ModelOutput:
    """Returns the output of a model whose encoder (None: it has none) and decoder returned these."""
    output = ModelOutput(
        logits=decoded.logits,
        head=decoded.head,
        decoder_last_hidden_state=decoded.last_hidden_state,
        decoder_router=decoded.router,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
    )
    if encoded is None:
        return output
    return dataclasses.replace(
        output,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_router=encoded.router,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
        cross_attentions=decoded.cross_attentions,
    )


class Decoder(Stack):
    """The decoder's stack, which also holds a head that is not the embeddings themselves."""

    def setup(self) -> None:
        super().setup()
        config = self.config
        if not config.tie_word_embeddings or config.copied_head:
            self.logits_dense = HeadKernel(config)


def _one_sequence(source: tuple[Any, ...], target: tuple[Any, ...], encoder_output: EncoderOutput | None) -> tuple[Any, ...]:
    """Returns ids, mask, embeddings and segments of a decoder-only model's sequence, under whichever names they were given."""
    twice = any(a is not None and b is not None for a, b in zip(source, target, strict=True))
    check(
        not twice and encoder_output is None,
        "A decoder-only model reads one sequence: give input_ids alone, which begin with what the rest continues.",
    )
    return tuple(b if a is None else a for a, b in zip(source, target, strict=True))


def _weights(outputs: list[LayerOutput], name: str) -> tuple[Array, ...]:
    """Returns every layer's attention probabilities of one kind, where it has them."""
    found = (getattr(output, name) for output in outputs)
    return tuple(probs for probs in found if probs is not None)


def _check_rows(encoded: EncoderOutput, fed: Any) -> None:
    sources, targets = encoded.last_hidden_state.shape[0], np.shape(fed)[:1]
    check(
        targets in ((), (sources,)),
        f"The encoder has {sources} rows and the decoder {targets and targets[0]}: a row of inputs needs one of labels "
        "(decoder_input_ids), and the other way round.",
    )


def _as_array(x: AnyArray | None) -> Array | None:
    return None if x is None else jnp.asarray(x)


def _check_mask(name: str, mask: Array | None, x: Float[Array, "B L D"]) -> None:
    if mask is not None:
        wanted, found = list(x.shape[:2]), list(mask.shape)
        check(found == wanted, f"{name} must have the shape of the ids, {wanted}; it is {found}.")


def _as_mask(x: AnyArray | None) -> Array | None:
    return None if x is None else jnp.asarray(x).astype(bool)
