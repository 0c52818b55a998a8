"""A model with its parameters into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.config import SwitchConfig, check, expect, one_of
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.config.weights import SCALE
from flax_switch.convert import checkpoint as checkpoints
from flax_switch.convert import tokenizer
from flax_switch.convert.canonical import HEAD, architecture_of, canonical_shapes, flatten
from flax_switch.convert.folder import DEFAULT_SHARD_SIZE, claimed, local_destination
from flax_switch.convert.mapping import SAME_NAMES, to_canonical
from flax_switch.convert.quantize import as_integers
from flax_switch.convert.scan import unstack_layers
from flax_switch.convert.tensors import LazyTensor, from_array
from flax_switch.generation.defaults import FILE, defaults_file
from flax_switch.nn.adapter import has_adapter
from flax_switch.ops.kernels.on_disk import check_in_memory

if TYPE_CHECKING:
    from flax_switch.data import Vocabulary


def save_pretrained(
    path: str | Path,
    config: SwitchConfig,
    params: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
    format: str = "huggingface",
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = True,
    generation_defaults: Mapping[str, Any] | None = None,
    prefixes: Sequence[str] = (),
) -> Path:
    """Saves a model so that `load_pretrained`, and in the format "huggingface" transformers, opens it.

    Args:
      path: a folder; it holds the model when the last file is written. A model that is there is replaced, unless overwrite=False.
      params: the model's parameters, scanned or not as the config says; dtypes are kept. Also those of an encoder alone,
        or of an untied model without its head.
      vocabulary: written as `spiece.model` and, for Hugging Face, a tokenizer_config.json so that AutoTokenizer opens it.
      format: "huggingface", "flax_switch" or "t5x".
      generation_defaults: controls of generation, written as `generation_config.json`, as are
      prefixes: what the model wants before its inputs.

    Raises:
      ConfigError: naming the fields that Hugging Face cannot represent.
      CheckpointError: if the parameters do not fit the config.
    """
    one_of("format", format, checkpoints.FORMATS)
    expect("config", config, SwitchConfig, "Arguments are save_pretrained(path, config, params, vocabulary=None).")
    destination = local_destination(path)
    flat = unscanned(config, params)
    if config.head != LANGUAGE_MODEL:
        architecture = architecture_of(config)
    elif not any(name.startswith("decoder/") for name in flat):
        architecture = "encoder"
    else:
        untied = not config.tie_word_embeddings
        architecture = "headless" if untied and HEAD not in flat else "full"
    tensors = to_canonical(flat, SAME_NAMES, canonical_shapes(config, architecture))
    saved = checkpoints.Checkpoint(format, destination, config, architecture, tensors)
    files = {} if vocabulary is None else tokenizer.vocabulary_files(vocabulary)
    if generation_defaults or any(prefixes):
        files[FILE] = defaults_file(generation_defaults or {}, prefixes, config).encode()
    with claimed(destination):
        return checkpoints.write_checkpoint(
            saved, destination, to=format, files=files, max_shard_size=max_shard_size, overwrite=overwrite
        )


def unscanned(config: SwitchConfig, params: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Returns a model's parameters by the names that files have, without a head that is a copy."""
    check_in_memory(params, "Saving or quantising a model")
    check(
        not has_adapter(params),
        "The model has an adapter in use, which would be lost: make it part of the kernels with merge_adapter(), or take it off "
        "with use_adapter(None); save_adapter(path) saves it alone.",
    )
    flat = {name: from_array(leaf) for name, leaf in flatten(dict(params)).items()}
    if config.copied_head:
        flat = {name: tensor for name, tensor in flat.items() if name.removesuffix(SCALE) != HEAD}
    return as_integers(config, unstack_layers(flat, config) if config.scan_layers else flat)
