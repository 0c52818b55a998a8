"""A model as a server has it: what a prompt is in ids, what the defaults are, and programs beside decoding: embeddings, routing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_switch.config import ConfigError, check
from flax_switch.config.generation import BEAMS_ONLY, GenerationConfig
from flax_switch.config.ranges import shown
from flax_switch.generation.defaults import with_defaults
from flax_switch.generation.program import encoder_config
from flax_switch.generation.slots import SlotDecoder
from flax_switch.generation.text import prefixed
from flax_switch.inspection.routing import StackRouting, stack_routings
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
from flax_switch.ops.kernels.on_disk import run_reading
from flax_switch.pretrained import Pretrained
from flax_switch.pretrained.tasks import embeddings
from flax_switch.serving.limits import Limits

log = logging.getLogger(__name__)

_NOT_FOLLOWED = ("num_beams", "num_return_sequences", "penalty_alpha", "forced_eos_token_id", "output_scores", *BEAMS_ONLY)


class Served:
    """One model of a server."""

    def __init__(self, name: str, pretrained: Pretrained, limits: Limits, like: Served | None = None):
        """Takes a model that is loaded. Its defaults of generation are followed, but for those of beams, which the log names.

        like: one of the same model, with another adapter or none, whose arrays and programs are used again.
        """
        self.name, self.limits, self.config = name, limits, pretrained.config
        check(
            not self.config.decoder_only,
            f"The model {name!r} is a decoder alone, and slots are for models that read a source with an encoder; `flax-switch "
            "generate` runs it.",
        )
        if pretrained.vocabulary is None:
            raise ConfigError(f"The model {name!r} has no vocabulary to read text with; put its spiece.model into the folder.")
        self.vocabulary, prefixes = pretrained.vocabulary, pretrained.prefixes_in_use
        self.prefix = prefixes[0] if len(prefixes) == 1 else ""
        defaults = pretrained.generation_defaults
        self.defaults = {key: value for key, value in defaults.items() if key not in _NOT_FOLLOWED}
        left = {key: value for key, value in defaults.items() if key in _NOT_FOLLOWED and value not in (1, None, False)}
        if left:
            log.warning("%s: its generation_config.json asks for %s, which is not served.", name, left)
        self._controls = functools.lru_cache(256)(self._new_controls)
        controls = self.controls({})
        self.decoder: SlotDecoder | None = None
        if pretrained.architecture == "full":
            if like is None or like.decoder is None:
                self.decoder = SlotDecoder(self.config, pretrained.params, controls, limits.max_tokens)
            else:
                self.decoder = like.decoder.with_adapter(pretrained.params)
            encoder, decoder, self._variables = self.decoder.encoder, self.decoder.decoder, self.decoder.variables
        else:
            encoder = pretrained.model.clone(config=encoder_config(self.config, controls.routing))
            decoder, self._variables = None, {"params": pretrained.params}
        programs = functools.partial(embeddings, encoder), functools.partial(_routers, encoder, decoder)
        self._programs = tuple(map(jax.jit, programs)) if like is None else like._programs

    def warm_up(self) -> None:
        """Compiles embeddings and routing for every length."""
        for length in self.limits.buckets:
            self.embed([self.config.eos_token_id], length)
            if self.config.is_sparse:
                self._routed([self.config.eos_token_id], [self.config.decoder_start_token_id], length)

    def controls(self, given: Mapping[str, Any]) -> GenerationConfig:
        """Returns the controls of a request: what it gives, over the model's defaults."""
        return self._controls(tuple(given.items()))

    def _new_controls(self, given: tuple[tuple[str, Any], ...]) -> GenerationConfig:
        return GenerationConfig(**with_defaults(self.defaults, dict(given))).for_model(self.config)

    def ids_of(self, prompt: str | Sequence[int], name: str = "prompt", prefix: str | None = None) -> list[int]:
        """Returns a prompt's ids: a text with the model's prefix (or another) and EOS, ids as they are.

        Raises `ConfigError`, which begins with `name`, for what cannot be.
        """
        if isinstance(prompt, str):
            most = 64 * self.limits.max_source_length  # characters; tokenising more only to refuse it would take long
            check(len(prompt) <= most, f"{name} has {len(prompt)} characters, more than {most}; shorten it.")
            text = prefixed(prompt, self.prefix if prefix is None else prefix)
            ids = [*self.vocabulary.encode_source(text), self.config.eos_token_id]
        else:
            ids = list(prompt)
        V, most = self.config.vocab_size, self.limits.max_source_length
        check(
            len(ids) > 0, f"{name} is an empty list; a source needs at least one token, such as EOS ({self.config.eos_token_id})."
        )
        check(len(ids) <= most, f"{name} has {len(ids)} tokens, EOS included; this server takes {most}. Shorten it.")
        bad = next((token for token in ids if not 0 <= token < V), None)
        check(bad is None, f"{name} holds {shown(bad)}, which is no id of the vocabulary of {V}.")
        return ids

    def embed(self, ids: Sequence[int], length: int | None = None) -> np.ndarray:
        """Returns the mean of the encoder's states over the tokens of a source, made of length 1: [d_model] in float32."""
        return np.asarray(self._run(0, *_filled(ids, length or self.limits.bucket(len(ids)))))[0]

    def routing(self, ids: Sequence[int], target: Sequence[int]) -> list[StackRouting]:
        """Returns what the routers decide about a source, and about the tokens of an output that the decoder is fed.

        Routing is that of generation: without dropping and padding, unless the model has a fixed capacity.
        """
        check(self.config.is_sparse, f"The model {self.name!r} has no sparse layer, so there is no routing to look at.")
        fed = [self.config.decoder_start_token_id, *target][: self.limits.max_tokens]
        routers = self._routed(ids, fed, self.limits.bucket(len(ids)))
        return stack_routings(self.config, self.vocabulary, [ids, fed], routers)

    def _routed(self, ids: Sequence[int], fed: Sequence[int], length: int) -> dict[str, Any]:
        inputs = _filled(ids, length)
        if self.decoder is not None:
            inputs += _filled(fed, self.limits.max_tokens)
        return jax.device_get(self._run(1, *inputs))

    def _run(self, program: int, *inputs: np.ndarray) -> Any:
        return run_reading(self._variables, lambda: self._programs[program](self._variables, *inputs))[0]


def _filled(row: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask [1, length]."""
    ids, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    ids[0, : len(row)], mask[0, : len(row)] = row, True
    return ids, mask


def _routers(encoder: SwitchEncoder, decoder: SwitchTransformer | None, variables, ids, mask, fed=None, fed_mask=None):
    encoded = encoder.apply(variables, ids, mask, output_router_logits=True, method="encode")
    found = {"encoder": encoded.router}
    if decoder is not None:
        states = encoded.last_hidden_state
        found["decoder"] = decoder.apply(variables, fed, states, mask, fed_mask, output_router_logits=True, method="decode").router
    return found
