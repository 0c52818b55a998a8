"""Defaults of generation that come with a model: its `generation_config.json`, as far as we have the controls; a task's prefix."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.config.generation import BEAMS_ONLY, SAMPLING_ONLY, GenerationConfig, tuples
from flax_switch.config.ranges import shown
from flax_switch.host.files import write_text
from flax_switch.host.json_text import field, read_json

log = logging.getLogger(__name__)

FILE = "generation_config.json"
PREFIX = "prefix"  # its entry for what a fine-tuned model wants before inputs, such as "summarize: "; of several tasks, a list
_OURS = {one.name for one in dataclasses.fields(GenerationConfig)} - {"output_scores", "routing", "brevity_penalty", "search"}
# What says nothing about tokens, and values of what we have not that change none.
_SILENT = {
    "transformers_version", "_from_model_config", "use_cache", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states", "bos_token_id", "cache_implementation", "trust_remote_code",
    PREFIX,
}  # fmt: skip
_COUNTS = ("num_beams", "num_beam_groups", "num_return_sequences", "min_new_tokens", "max_new_tokens")
_NEUTRAL = {
    "renormalize_logits": False, "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0, "remove_invalid_values": False, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
}  # fmt: skip


def read_defaults(folder: epath.PathLike) -> dict[str, Any]:
    """Returns the controls that a model's folder asks for; what it asks for and we have not is named in the log.

    max_length and min_length, which count the start token, become max_new_tokens and min_new_tokens. Raises `ConfigError` for a
    file that cannot be read, or a value that cannot be.
    """
    path = epath.Path(folder) / FILE
    return defaults_of(read_json(path), str(path)) if path.is_file() else {}


def defaults_of(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the controls that a generation_config.json's values ask for, as `read_defaults`; messages name `source`."""
    values = {name: value for name, value in values.items() if value is not None and name not in _SILENT}
    for old, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if old in values:
            length = field(values, old, int, source)
            check(length >= 0, f"{source}: {old} must not be negative; it is {shown(length)}.")
            if values.pop(old):
                values.setdefault(new, max(length - 1, int(old == "max_length")))
    unknown = {name: value for name, value in values.items() if name not in _OURS and _NEUTRAL.get(name) != value}
    if unknown:
        listed = ", ".join(f"{name}={shown(value)}" for name, value in unknown.items())
        log.warning("%s asks for what is not followed: %s.", source, listed)
    found = {name: tuples(value) for name, value in values.items() if name in _OURS}
    try:
        GenerationConfig(**with_defaults(found, {}))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return found


def read_prefixes(folder: epath.PathLike) -> tuple[str, ...]:
    """Returns what a model's folder wants before inputs: nothing for most, a text, or one of several where tasks were mixed.

    A run's step has it in the run's folder.
    """
    for place in (epath.Path(folder), epath.Path(folder).parent.parent):
        path = place / FILE
        if path.is_file():
            found = field(read_json(path), PREFIX, (str, list, type(None)), str(path), None) or []
            prefixes = found if isinstance(found, list) else [found]
            right = all(isinstance(prefix, str) for prefix in prefixes)
            check(right, f"{path}: {PREFIX} must be a text, or a list of texts; it is {shown(found)}.")
            return tuple(prefixes)
        if place.parent.name != "checkpoints":
            break
    return ()


def write_prefixes(folder: epath.PathLike, prefixes: Sequence[str], config: SwitchConfig) -> None:
    """Has a model's folder remember the prefixes of its tasks, which `read_prefixes` finds; where none has one it does nothing."""
    if any(prefixes):
        write_text(epath.Path(folder) / FILE, defaults_file({}, prefixes, config))


def defaults_file(defaults: Mapping[str, Any], prefixes: Sequence[str], config: SwitchConfig) -> str:
    """Returns the text of a `generation_config.json` with defaults and prefixes.

    It holds the model's special tokens, too: where there is one, transformers takes them from nowhere else.
    """
    tokens = {name: getattr(config, name) for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    entry = {PREFIX: prefixes[0] if len(prefixes) == 1 else list(prefixes)} if any(prefixes) else {}
    return json.dumps({**tokens, **defaults, **entry}, indent=2) + "\n"


def with_defaults(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the controls that were given over a model's defaults, of which those that then have no effect are left out."""
    merged = {**defaults, **given}
    if not all(isinstance(merged.get(name, 1), int) for name in _COUNTS):
        return merged  # `GenerationConfig` says what is wrong
    idle: set[str] = set()
    if given.get("search") == "t5x":
        idle |= {"do_sample", "length_penalty", "early_stopping", "num_beam_groups"}
    if given.get("penalty_alpha") is not None:
        idle |= {"do_sample", "num_beams"}
    if given.get("num_beam_groups", 1) > 1:
        idle |= {"do_sample"}

    def kept(name: str, neutral: Any) -> Any:
        return merged.get(name, neutral) if name in given or name not in idle else neutral

    sampling, beams = kept("do_sample", False), kept("num_beams", 1)
    if sampling or beams > 1:
        idle.add("penalty_alpha")
    if not sampling:
        idle |= {*SAMPLING_ONLY} - ({"top_k"} if kept("penalty_alpha", None) is not None else set())
    if sampling or beams % max(kept("num_beam_groups", 1), 1):
        idle.add("num_beam_groups")
    if kept("num_beam_groups", 1) == 1:
        idle.add("diversity_penalty")
    if beams == 1:
        idle |= {*BEAMS_ONLY} | (set() if sampling else {"num_return_sequences"})
    elif merged.get("num_return_sequences", 1) > beams:
        idle.add("num_return_sequences")
    if "brevity_penalty" in given:
        idle.add("length_penalty")
    if merged.get("min_new_tokens", 0) > merged.get("max_new_tokens", GenerationConfig.max_new_tokens):
        idle.add("min_new_tokens")
    return {name: value for name, value in merged.items() if name in given or name not in idle}
