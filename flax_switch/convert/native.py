"""flax_switch's own folder: the config as JSON, and the canonical parameters in safetensors shards.

    flax_switch.json            format_version, the config, the architecture, and what else a Hugging Face config.json held
    params.safetensors          or params-00001-of-00003.safetensors ... with params.safetensors.index.json
    spiece.model ...            the vocabulary's files, as they were

Tensors have their canonical names and the dtypes they came with. An expert stack larger than a shard is divided along its
experts, in parts named `name[start:stop]`, so a process that needs some experts reads those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError, SwitchConfig, one_of
from flax_switch.convert.canonical import ARCHITECTURES, canonical_shapes
from flax_switch.convert.doors import check_counts, config_of
from flax_switch.convert.folder import join_parts, read_folder
from flax_switch.convert.huggingface import read_json
from flax_switch.convert.mapping import SAME_NAMES, to_canonical
from flax_switch.convert.quantize import check_dtypes
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.tensors import CheckpointError, LazyTensor
from flax_switch.host.json_text import field

CONFIG_FILE = "flax_switch.json"
STEM = "params"
FORMAT_VERSION = 1


def config_file(config: SwitchConfig, architecture: str, huggingface: Mapping[str, Any] | None) -> bytes:
    """Returns the contents of `flax_switch.json`.

    `huggingface` is the config.json the model came with, if it came from there: its fields that mean nothing here are written
    back on export.
    """
    values = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "config": config.to_dict(),
        "huggingface": None if huggingface is None else dict(huggingface),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def read_native(folder: Path, *, allow_missing: Sequence[str] = ()) -> tuple[SwitchConfig, str, dict[str, LazyTensor], dict | None]:
    """Returns a folder's config, architecture, canonical tensors and, where it came from Hugging Face, that config.json."""
    values, where = read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE)
    try:
        version, architecture = field(values, "format_version", int, where), field(values, "architecture", str, where)
        settings, came_with = field(values, "config", dict, where), field(values, "huggingface", (dict, type(None)), where, None)
        one_of(f"{where}: architecture", architecture, tuple(ARCHITECTURES))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where} has format_version {version}; this release reads {FORMAT_VERSION}. Upgrade flax_switch.")
    tensors = join_parts(read_folder(folder, STEM, read_safetensors, "safetensors"))
    check_counts(settings, tensors, folder / CONFIG_FILE)
    with config_of(folder / CONFIG_FILE):
        config = SwitchConfig.from_dict(settings)
    expected = canonical_shapes(config, architecture)
    try:
        canonical = to_canonical(tensors, SAME_NAMES, expected, allow_missing=allow_missing)
        check_dtypes(config, canonical)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return config, architecture, canonical, came_with
