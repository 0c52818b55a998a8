"""A model with its parameters and vocabulary, called the way Hugging Face's are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_switch.config import ConfigError, SwitchConfig, check, one_of
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.convert.adapter import Adapter
from flax_switch.convert.adapter_folder import write_adapter
from flax_switch.generation.defaults import FILE, defaults_file, with_defaults
from flax_switch.nn.adapter import adapted, without_adapter
from flax_switch.nn.inputs import SupportsArray, TokenIds, as_array, as_embeddings, as_ids, as_mask, check_alive, shift_right
from flax_switch.nn.outputs import EncoderOutput
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.kernels.on_disk import first_on_disk, run_reading
from flax_switch.pretrained import outputs, table, tasks
from flax_switch.pretrained.adapter import Held, held, merged_model
from flax_switch.pretrained.saving import save_pretrained

if TYPE_CHECKING:
    from flax_switch.data.vocabulary import Vocabulary
    from flax_switch.generation.generate import GenerationOutput
    from flax_switch.generation.stream import Piece
    from flax_switch.host.expert_cache import ExpertReads


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A config, a model, its parameters and (where the checkpoint had one) its vocabulary.

    Calling it runs the model with Hugging Face's argument and output names. `architecture` says what of a model it is: "full",
    "headless" (`SwitchTransformersModel`, which returns hidden states) or "encoder" (`SwitchTransformersEncoderModel`).
    `generation_defaults` are the controls that its generation_config.json asks for, `prefixes` what its tasks had before inputs.
    `adapters` are those it knows by name, and `adapter` the one that its parameters have.
    """

    config: SwitchConfig
    model: SwitchEncoder
    params: dict[str, Any]
    vocabulary: Vocabulary | None = None
    architecture: str = "full"
    generation_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    adapters: Mapping[str, Held] = dataclasses.field(default_factory=dict)
    adapter: str | None = None

    @property
    def expert_reads(self) -> ExpertReads | None:
        """What was hit and read of experts on disk since the model was loaded; None where they are in memory."""
        found = first_on_disk(self.params)
        return None if found is None else found.cache.reads

    @property
    def prefixes_in_use(self) -> tuple[str, ...]:
        """What tasks had before inputs: those of the adapter in use, or else the model's."""
        return (() if self.adapter is None else self._in_use().prefixes) or self.prefixes

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed: the parameters after an update, for instance."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        return table.as_text(self)

    def _repr_html_(self) -> str:
        return table.as_html(self)

    def __call__(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
        decoder_input_ids: TokenIds | None = None,
        decoder_attention_mask: TokenIds | None = None,
        *,
        encoder_outputs: Any = None,
        inputs_embeds: SupportsArray | None = None,
        decoder_inputs_embeds: SupportsArray | None = None,
        labels: TokenIds | None = None,
        prefix_mask: TokenIds | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        past_key_values: None = None,
        cache: None = None,
        deterministic: bool = True,
        rngs: Mapping[str, Array] | None = None,
    ) -> outputs.Seq2SeqLMOutput:  # nearly always; see below
        """Runs the model; arguments and outputs are named as in transformers.

        Ids and masks [rows, tokens], or a single row [tokens], may be lists or the arrays of any library. A decoder-only model has
        one sequence: `input_ids`, or under its own name `decoder_input_ids`.

        Args:
          encoder_outputs: of an earlier call or `encode`, instead of input_ids.
          labels: target ids, -100 where they do not count: label i is what follows the decoder's input i. The decoder's inputs are
            made from them unless given.
          prefix_mask: of a decoder-only model, 1 at tokens that see each other (config.bidirectional_inputs).
          output_router_logits: return the routers' logits and losses, and add the latter to the loss.
          return_dict: False for a tuple of what is there, in the order of the fields.
          use_cache, past_key_values, cache: refused where they ask for a cache; `generate` has one of its own.
          deterministic: False for training; `rngs` then holds the streams "dropout" and "jitter".

        Returns:
          A `Seq2SeqLMOutput`; of a model without a head a `Seq2SeqModelOutput`, of an encoder alone an `EncoderModelOutput`, with
          the head of a task a `TaskOutput`.

        Raises:
          ConfigError: naming the input that cannot be, and why.
        """
        check(
            not use_cache and past_key_values is None and cache is None,
            "use_cache, past_key_values and cache ask for a decoder's cache, which a call neither takes nor returns: `generate` "
            "keeps one inside its program. Leave them out, or for steps of your own see `SwitchTransformer.init_cache`.",
        )
        asked = dict(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        options = dict(deterministic=deterministic, output_router_logits=output_router_logits, **asked)
        if self.config.head != LANGUAGE_MODEL:
            others = (decoder_input_ids, decoder_attention_mask, encoder_outputs, inputs_embeds, decoder_inputs_embeds, prefix_mask)
            output: Any = self._call_task(input_ids, attention_mask, labels, others, rngs, options)
            return output.to_tuple() if return_dict is False else output
        source, target = self._source(input_ids, attention_mask, inputs_embeds, encoder_outputs), None
        if self.config.decoder_only:
            fed = (decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds)
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds = _one_sequence(source, fed, labels)
            source = (None, None, None)
        if self.architecture == "encoder":
            raw = self.run(_encode, *source, rngs, **options)
            output = outputs.encoder_output(raw)
            return output.to_tuple() if return_dict is False else output
        if labels is not None:
            target = jnp.asarray(as_ids("labels", labels, self.config, ignored=True))
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shift_right(target, self.config)
        check(
            decoder_input_ids is not None or decoder_inputs_embeds is not None,
            "The decoder has no input: give labels, decoder_input_ids or decoder_inputs_embeds (or call .encode).",
        )
        inputs = self._inputs(decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, "decoder_")
        prefix = None if prefix_mask is None else as_mask("prefix_mask", prefix_mask, np.shape(prefix_mask))
        raw = self.run(_apply, *source, *inputs, _as_encoder_output(encoder_outputs), prefix, rngs, **options)
        if self.architecture == "headless":
            output = outputs.model_output(raw)
        else:
            output = outputs.lm_output(raw, target, self.config, output_router_logits)
        return output.to_tuple() if return_dict is False else output

    def _call_task(self, input_ids: Any, attention_mask: Any, labels: Any, others: Any, rngs: Any, options: Any) -> Any:
        """Returns the output of the head of a task; `others` are inputs that only a language model takes."""
        check(
            all(other is None for other in others),
            f"A model with a head for {self.config.head} takes input_ids, attention_mask and labels; leave other inputs out.",
        )
        ids, mask, _ = self._source(input_ids, attention_mask, None)
        tasks.check_ends(ids, self.config)
        raw = self.run(_task, ids, mask, rngs, **options)
        return outputs.task_output(raw, labels, self.config, options["output_router_logits"])

    def encode(
        self, input_ids: TokenIds | None = None, attention_mask: TokenIds | None = None, **options: Any
    ) -> outputs.EncoderModelOutput:
        """Returns the encoder alone; options as for the call (inputs_embeds, output_hidden_states, ...)."""
        check(not self.config.decoder_only, "This model has no encoder; a call with output_hidden_states=True has hidden states.")
        defaults = dict(
            deterministic=True, output_router_logits=False, output_hidden_states=False, output_attentions=False,
        )  # fmt: skip
        embeds, rngs = options.pop("inputs_embeds", None), options.pop("rngs", None)
        source = self._source(input_ids, attention_mask, embeds)
        return outputs.encoder_output(self.run(_encode, *source, rngs, **{**defaults, **options}))

    def run(self, program: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Returns what a compiled program of (model, parameters, inputs, options) makes; experts on disk are read for it."""
        return run_reading(self.params, lambda: program(self.model, self.params, *inputs, **options))[0]

    def _source(self, ids: Any, mask: Any, embeds: Any, encoded: Any = None) -> tuple[Any, Any, Any]:
        """Returns the encoder's ids, mask and embeddings, checked; with its output given, the mask alone."""
        check_alive("The model's parameters", self.params, "model.replace(params=state.params) is the model after it")
        if self.config.decoder_only:
            check(encoded is None, "A decoder-only model has no encoder whose outputs it could take; leave encoder_outputs out.")
            return ids, mask, embeds
        check(
            ids is not None or embeds is not None or encoded is not None,
            "The encoder has no input: give input_ids, inputs_embeds or encoder_outputs.",
        )
        if encoded is None or ids is not None or embeds is not None:
            return self._inputs(ids, mask, embeds)
        states = _as_encoder_output(encoded).last_hidden_state
        return None, None if mask is None else as_mask("attention_mask", mask, states.shape[:2], "encoder_outputs"), None

    def _inputs(self, ids: Any, mask: Any, embeds: Any, prefix: str = "") -> tuple[Any, Any, Any]:
        """Returns a stack's ids, mask and embeddings as arrays that fit together."""
        name, of = f"{prefix}input_ids", f"{prefix}inputs_embeds"
        check(ids is None or embeds is None, f"Give {name} or {of}, not both: the embeddings stand in place of the ids.")
        ids = None if ids is None else as_ids(name, ids, self.config)
        embeds = None if embeds is None else as_embeddings(of, embeds, self.config)
        shape, of = (embeds.shape[:2], of) if ids is None else (ids.shape, name)
        return ids, None if mask is None else as_mask(f"{prefix}attention_mask", mask, shape, of), embeds

    def generate(
        self,
        input_ids: str | Sequence[str] | TokenIds,
        attention_mask: TokenIds | None = None,
        *,
        prefix: str | None = None,
        adapter: str | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        **controls: Any,
    ) -> GenerationOutput:
        """`flax_switch.generate` with this model, its parameters and, where no control is given, its defaults.

        Args:
          input_ids: a text, texts, or ids (lists or the arrays of any library).
          adapter: the name of one of the model's adapters; by default the one in use.
          prefix: put before every text that does not begin with it; by default what the adapter in use, or else the model, was
            fine-tuned with, if that is one.
          source_language: of the texts, such as "eng_Latn", where the vocabulary has tokens for languages.
          target_language: the one that outputs begin with.

        Returns:
          The output; its `texts` are there where the model has a vocabulary.

        Raises:
          ConfigError: naming the control or the input that cannot be; for text where there is no vocabulary.
        """
        from flax_switch.generation.generate import generate
        from flax_switch.generation.text import texts_of, with_languages

        prefix, controls = with_languages(self.vocabulary, prefix, controls, source_language, target_language)
        model, ids, mask, controls = self._asked(input_ids, attention_mask, prefix, adapter, controls)
        output = generate(model.model, model.params, ids, mask, **controls)
        if self.vocabulary is None:
            return output
        return dataclasses.replace(output, texts=tuple(texts_of(output.sequences, self.vocabulary, self.config)))

    def stream(
        self,
        input_ids: str | Sequence[str] | TokenIds,
        attention_mask: TokenIds | None = None,
        *,
        prefix: str | None = None,
        adapter: str | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        **controls: Any,
    ) -> Iterator[Piece]:
        """Returns an iterator over what `generate` makes of one source, while it is made: a piece for every token.

        Arguments are `generate`'s. Joined, the pieces' tokens are its sequence and their texts its text; the first piece holds what
        the sequence begins with, which of a decoder-only model are its inputs.

        Raises:
          ConfigError: at once, as `generate`; for beams and for more than one sequence, too.
        """
        from flax_switch.generation.stream import stream_pieces
        from flax_switch.generation.text import with_languages

        prefix, controls = with_languages(self.vocabulary, prefix, controls, source_language, target_language)
        model, ids, mask, controls = self._asked(input_ids, attention_mask, prefix, adapter, controls)
        return stream_pieces(model.model, model.params, ids, mask, self.vocabulary, **controls)

    def _asked(
        self, source: Any, mask: Any, prefix: str | None, adapter: str | None, controls: Mapping[str, Any]
    ) -> tuple[Self, Any, Any, dict[str, Any]]:
        """Returns the model with the adapter that is asked for, a source's ids and mask, and controls over the defaults."""
        if adapter is not None and adapter != self.adapter:
            return self.use_adapter(adapter)._asked(source, mask, prefix, None, controls)
        if prefix is None:
            known = self.prefixes_in_use
            prefix = known[0] if len(known) == 1 else ""
        return self, *self._encoded(source, mask, prefix), with_defaults(self.generation_defaults, controls)

    def _encoded(self, source: Any, mask: Any, prefix: str) -> tuple[Any, Any]:
        """Returns ids and mask of what `generate` is given: texts are encoded with their prefix, ids stay as they are."""
        from flax_switch.generation.text import encode_sources, prefixed

        texts = [source] if isinstance(source, str) else source
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            return source, mask
        check(
            self.vocabulary is not None,
            "The model has no vocabulary to tokenise text with; put its spiece.model into the folder, or give ids.",
        )
        check(mask is None, "attention_mask is for ids; of a text every token counts. Leave it out.")
        return encode_sources([prefixed(text, prefix) for text in texts], self.vocabulary, self.config)

    def classify(self, texts: str | Sequence[str], *, batch_size: int = 32) -> list[tasks.Classified]:
        """Returns the class of each text, with probabilities; raises `ConfigError` for a model without such a head."""
        return tasks.classify(self, texts, batch_size)

    def label(self, texts: str | Sequence[str], *, batch_size: int = 32) -> list[tasks.Labelled]:
        """Returns the classes of each text, any number of them, of a head for multi-label classification."""
        return tasks.label(self, texts, batch_size)

    def regress(self, texts: str | Sequence[str], *, batch_size: int = 32) -> Float[np.ndarray, " B"]:
        """Returns the number that a head for regression gives each text."""
        return tasks.regress(self, texts, batch_size)

    def tag(self, texts: str | Sequence[str] | Sequence[Sequence[str]], *, batch_size: int = 32) -> list[list[tasks.Tagged]]:
        """Returns for each text, or list of words, its words with a tag each, of a head for token classification."""
        return tasks.tag(self, texts, batch_size)

    def answer(self, questions: str | Sequence[str], contexts: str | Sequence[str], *, batch_size: int = 32) -> list[tasks.Answer]:
        """Returns for each question the span of its context that a head for question answering finds."""
        return tasks.answer(self, questions, contexts, batch_size)

    def embed(self, texts: str | Sequence[str], *, batch_size: int = 32) -> Float[np.ndarray, "B D"]:
        """Returns a vector of length 1 for each text: the mean of the encoder's states, of any model that has one."""
        return tasks.embed(self, texts, batch_size)

    def with_adapter(self, adapter: Any, name: str = "default") -> Self:
        """Returns the model with an adapter in use, beside those that it knows already; the parameters are shared.

        Args:
          adapter: what `load_adapter` returns, or a folder; or several of them by name, the last of which is in use.
          name: of a single one.

        Raises:
          CheckpointError: where one is another model's, naming what does not fit.
        """
        given = adapter if isinstance(adapter, Mapping) else {name: adapter}
        found = {name: held(one, name, self) for name, one in given.items()}
        return self.replace(adapters={**self.adapters, **found}).use_adapter(next(reversed(found), self.adapter))

    def use_adapter(self, name: str | None) -> Self:
        """Returns the model with another of its adapters in use, or with none; programs are those of before."""
        params = without_adapter(self.params)
        if name is not None:
            one_of("adapter", name, tuple(self.adapters))
            params = adapted(params, self.adapters[name].tree)
        return self.replace(params=params, adapter=name)

    def merge_adapter(self) -> Pretrained:
        """Returns the model with the adapter in use made part of its kernels, and no others.

        Raises `ConfigError` where none is in use, or the kernels are integers.
        """
        return merged_model(self, self._in_use())

    def save_adapter(self, path: str | Path, format: str = "peft") -> Path:
        """Saves the adapter in use into a folder: PEFT's ("peft"), or one of ours ("flax_switch"), which holds any.

        Raises `CheckpointError` for kernels that PEFT has no names for.
        """
        adapter = self._in_use()
        files = {FILE: defaults_file({}, adapter.prefixes, self.config).encode()} if any(adapter.prefixes) else {}
        return write_adapter(path, adapter, self.config, format=format, files=files)

    def _in_use(self) -> Adapter:
        if self.adapter is None:
            raise ConfigError("No adapter is in use; with_adapter(folder) loads one, and use_adapter(name) takes one of several.")
        return self.adapters[self.adapter].adapter

    def save_pretrained(self, path: str | Path, format: str = "huggingface", **options: Any) -> Path:
        """Saves it, with its prefixes and defaults of generation; see `flax_switch.save_pretrained`."""
        options = {"generation_defaults": self.generation_defaults, "prefixes": self.prefixes, **options}
        return save_pretrained(path, self.config, self.params, self.vocabulary, format, **options)


_OPTIONS = ("deterministic", "output_router_logits", "output_hidden_states", "output_attentions")


@functools.partial(jax.jit, static_argnums=0, static_argnames=_OPTIONS)
def _encode(model, params, input_ids, attention_mask, inputs_embeds, rngs, **options):
    return model.apply(
        {"params": params}, input_ids, attention_mask, inputs_embeds=inputs_embeds, rngs=rngs, method="encode", **options
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=_OPTIONS)
def _task(model, params, input_ids, attention_mask, rngs, **options):
    return model.apply({"params": params}, input_ids, attention_mask, rngs=rngs, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=_OPTIONS)
def _apply(
    model, params, input_ids, attention_mask, inputs_embeds, decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds,
    encoder_output, prefix_mask, rngs, **options,
):  # fmt: skip
    return model.apply(
        {"params": params},
        input_ids,
        decoder_input_ids,
        attention_mask,
        decoder_attention_mask,
        inputs_embeds=inputs_embeds,
        decoder_inputs_embeds=decoder_inputs_embeds,
        encoder_output=encoder_output,
        prefix_mask=prefix_mask,
        rngs=rngs,
        **options,
    )


def _one_sequence(source: tuple[Any, Any, Any], fed: tuple[Any, Any, Any], labels: Any) -> tuple[Any, Any, Any]:
    """Returns ids, mask and embeddings of a decoder-only model's sequence, under whichever names they were given."""
    named = [ids is not None or embeds is not None for ids, _, embeds in (source, fed)]
    check(
        not named[0] or (not named[1] and labels is None),
        "A decoder-only model reads one sequence: give input_ids alone, or labels alone, of which its inputs are made, or "
        "decoder_input_ids and labels, label i being what follows input i.",
    )
    return source if named[0] else fed


def _as_encoder_output(value: Any) -> Any:
    """Takes an encoder's output in any of its shapes: ours, under Hugging Face's names, or a tuple that begins with the states."""
    if value is None or isinstance(value, EncoderOutput):
        return value
    states = value[0] if isinstance(value, (tuple, list)) else value.last_hidden_state
    return EncoderOutput(
        last_hidden_state=jnp.asarray(as_array("encoder_outputs", states)),
        hidden_states=getattr(value, "hidden_states", None),
        attentions=getattr(value, "attentions", None),
    )
