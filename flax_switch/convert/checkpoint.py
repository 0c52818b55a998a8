"""Any checkpoint in, either format out: what `flax-switch convert`, `load_pretrained` and `inspect` share.

A `Checkpoint` is a config and the canonical tensors, unread. Formats are detected by the files a folder holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import SwitchConfig, check, one_of
from flax_switch.config import huggingface as config_huggingface
from flax_switch.config.heads import head_changes
from flax_switch.convert import hub, huggingface, native, t5x, t5x_writing, tokenizer, training_run
from flax_switch.convert.canonical import architecture_of, canonical_shapes
from flax_switch.convert.doors import check_folder, read_companion, readable
from flax_switch.convert.folder import (
    COMPANIONS,
    DEFAULT_SHARD_SIZE,
    claimed,
    local_destination,
    named,
    parse_size,
    split_into_shards,
    write_folder,
)
from flax_switch.convert.quantize import dequantized, in_dtype, with_weights
from flax_switch.convert.safetensors_file import write_safetensors
from flax_switch.convert.tensors import CheckpointError, LazyTensor
from flax_switch.host.files import in_store
from flax_switch.host.memory import freed_memory_returned

FORMATS = ("huggingface", "flax_switch", "t5x")  # those that can be written

# Keys of a config.json that say again, or said once, what other keys say.
_STALE = ("torch_dtype", "scale_decoder_outputs", "encoder_sparse_step", "decoder_sparse_step", "feed_forward_proj")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its tensors unread.

    `tensors` are canonical and unscanned whatever the source was. `huggingface` is the config.json it came with, if any;
    `path` the folder its weights are in (of a run, the step's).
    """

    format: str  # "huggingface", "t5x", "flax_switch" or "orbax"
    path: Path
    config: SwitchConfig
    architecture: str  # "full", "headless" or "encoder"
    tensors: Mapping[str, LazyTensor]
    huggingface: Mapping[str, Any] | None = None


def detect_format(folder: Path) -> str:
    """Returns a folder's format: "flax_switch", "t5x", "orbax" or "huggingface". Raises for a device, pipe or socket in it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: a checkpoint is one, or the name of a model on the Hugging Face hub.")
    check_folder(folder)
    if (folder / native.CONFIG_FILE).is_file():
        return "flax_switch"
    if t5x.find_checkpoint(folder) is not None:
        return "t5x"
    if training_run.find_checkpoint(folder) is not None:
        return "orbax"
    if training_run.is_run(folder):
        raise CheckpointError(f"{folder} is a training run without a complete checkpoint yet; wait for its first.")
    if (folder / "config.json").is_file():
        return "huggingface"
    if any((folder / name).is_file() for name in (training_run.ADAPTER_FILE, "adapter_config.json")):
        raise CheckpointError(
            f"{folder} holds an adapter, not a model. Open the model that it is for, and name the adapter beside it: --adapter, in "
            "Python with_adapter; or make one model of them: flax-switch convert ADAPTER DST --base MODEL --merge."
        )
    partial = " It looks like a conversion that was interrupted; run that again." if folder.name.endswith(".partial") else ""
    raise CheckpointError(
        f"{folder} holds no checkpoint that is known: no config.json (Hugging Face), no 'checkpoint' or checkpoint_<step> (T5X), "
        f"no {native.CONFIG_FILE} (flax_switch), and no training checkpoint.{partial}"
    )


def open_checkpoint(
    source: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    verify: bool = True,
) -> Checkpoint:
    """Opens a checkpoint of any format; reads headers, no weights (but for a run's, which it compares with their checksums).

    Args:
      source: a folder, or the name of a model on the Hugging Face hub (with the extra `hub`).
      changes: fields of the config to change; for a T5X checkpoint, those that shapes cannot tell. "weights" is a form to read
        kernels in (`convert.quantize.with_weights`).
      allow_missing: patterns of tensors that may be missing, or be left over.
      revision: of a model on the hub.
      verify: of a training run take the newest checkpoint whose parameters have their checksums; without, the newest.

    Raises:
      CheckpointError: naming what is wrong with the folder.
      ConfigError: if the config cannot be read or the changes do not fit it.
    """
    folder = hub.local_folder(source, revision)
    with readable(folder):
        return _opened(folder, changes or {}, allow_missing, verify)


def _opened(folder: Path, changes: Mapping[str, Any], allow_missing: Sequence[str], verify: bool) -> Checkpoint:
    format = detect_format(folder)
    changes, raw = dict(changes), None
    weights, of_head = changes.pop("weights", None), taken_head(changes)
    if format == "huggingface":
        config, architecture, tensors, raw = huggingface.read_huggingface(folder, allow_missing=allow_missing)
    elif format == "flax_switch":
        config, architecture, tensors, raw = native.read_native(folder, allow_missing=allow_missing)
    elif format == "orbax":
        step = training_run.whole_checkpoint(folder) if verify else training_run.find_checkpoint(folder)
        assert step is not None  # `detect_format` has found one
        folder = step
        config, architecture, tensors = training_run.read_run(folder, allow_missing=allow_missing)
    else:
        config, architecture, tensors = t5x.read_t5x(folder, changes=changes, allow_missing=allow_missing)
    config, architecture, tensors = with_head(config, architecture, tensors, of_head, folder)
    config = changed(config, architecture, tensors, changes, folder)
    if weights is not None:
        config, tensors = with_weights(config, tensors, weights)
    return Checkpoint(format, folder, config, architecture, tensors, raw)


def taken_head(changes: dict[str, Any]) -> dict[str, Any]:
    """Takes what is about the head out of changes to a config and returns it: the rest is of the checkpoint as it is."""
    return {name: changes.pop(name) for name in ("head", "labels") if name in changes}


def with_head(
    config: SwitchConfig, architecture: str, tensors: Mapping[str, LazyTensor], changes: Mapping[str, Any], source: object
) -> tuple[SwitchConfig, str, Mapping[str, LazyTensor]]:
    """Returns a checkpoint with the head that changes ask for; tensors of a head that it lacks are missing.

    A decoder or head that the new head does not read is left out. Raises `ConfigError` where a trained head would be lost.
    """
    wanted = head_changes(config, changes, source)
    if not wanted:
        return config, architecture, tensors
    config = config.replace(**wanted)
    shapes = canonical_shapes(config)
    new = sorted({path.split("/")[0] for path in shapes if path not in tensors})
    check(
        "decoder" not in new,
        f"{source} has no decoder, which head={config.head!r} reads. Open one of the whole model, or take a head that reads "
        "the encoder: token_classification or embedding.",
    )
    if new:
        log.info("%s has no head for %s: its parameters (%s) are new", source, config.head, ", ".join(new))
    return config, architecture_of(config), {path: tensor for path, tensor in tensors.items() if path in shapes}


def changed(
    config: SwitchConfig, architecture: str, tensors: Mapping[str, LazyTensor], changes: Mapping[str, Any], source: object
) -> SwitchConfig:
    """Returns a checkpoint's config with changes; raises `ConfigError` where its tensors then do not fit."""
    config = widened(config, changes, source).replace(**changes)
    shapes = canonical_shapes(config, architecture)
    for path, tensor in tensors.items():
        check(
            shapes.get(path) == tensor.shape,
            f"the changes {dict(changes)} do not fit the checkpoint: {path} is {list(tensor.shape)} there. Change settings "
            "of behaviour, not sizes.",
        )
    return config


def widened(config: SwitchConfig, changes: Mapping[str, Any], source: object) -> SwitchConfig:
    """Has a float16 model compute in float32, unless `changes` ask for another dtype; its parameters stay float16.

    T5's residual stream exceeds float16's 65,504. transformers clamps it after each sublayer and keeps T5's wo in float32; with
    room for it neither is needed.
    """
    if config.dtype != "float16" or "dtype" in changes:
        return config
    log.info("%s has float16 parameters; it computes in float32, as T5's activations exceed float16's range", source)
    return config.replace(dtype="float32", expert_dtype=None if config.expert_dtype == "float16" else config.expert_dtype)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    changes: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    overwrite: bool = False,
    revision: str | None = None,
    verify: bool = True,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
) -> Path:
    """Converts a checkpoint, one tensor at a time; the destination appears when it is whole.

    Args:
      source: as for `open_checkpoint`.
      destination: a folder without a model in it, or one to overwrite. Until it is complete, everything is in
        `<destination>.partial`; running an interrupted conversion again continues with the shards it finished.
      to: "huggingface", "flax_switch" or "t5x".
      dtype: of the written tensors; None keeps each tensor's. Routers keep theirs either way (selective precision, 2101.03961).
      max_shard_size: largest file, as "5GB"; T5X has a folder for each tensor.
      verify: as for `open_checkpoint`.
      on_open, on_bytes: progress: the number of bytes to write, once, and then those written.

    Returns:
      The destination.

    Raises:
      ConfigError: where another conversion writes to the destination, saying which.
    """
    one_of("to", to, FORMATS)
    destination = local_destination(destination)
    with claimed(destination):  # before the source is opened, which the destination may be
        checkpoint = open_checkpoint(source, changes=changes, allow_missing=allow_missing, revision=revision, verify=verify)
        return write_checkpoint(
            checkpoint if dtype is None else with_dtype(checkpoint, dtype),
            destination,
            to=to,
            files=companion_files(checkpoint.path),
            max_shard_size=max_shard_size,
            source=source_identity(checkpoint.path),
            overwrite=overwrite,
            on_bytes=on_bytes,
            on_open=on_open,
        )


def with_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Casts all tensors of a checkpoint but the routers' and integers with their scales when they are read."""
    tensors = in_dtype(checkpoint.tensors, dtype)
    return dataclasses.replace(checkpoint, tensors=tensors, config=checkpoint.config.replace(param_dtype=dtype))


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    to: str,
    files: Mapping[str, bytes],
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    source: object = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
) -> Path:
    """Writes a checkpoint's tensors in one of the `FORMATS`, with `files` beside them; see `convert`."""
    size, write = parse_size(max_shard_size), write_safetensors
    if to != "flax_switch" and checkpoint.config.weights != "float":
        log.info("Files for %s hold no %s weights: the numbers that they mean are written", to, checkpoint.config.weights)
        checkpoint = as_floats(checkpoint)
    if to == "huggingface":
        values, model_type = export_config(checkpoint)
        tensors = huggingface.huggingface_tensors(checkpoint.config, checkpoint.architecture, model_type, checkpoint.tensors)
        shards, more = named(split_into_shards(tensors, size), "model")
        files = {**files, "config.json": (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()}
        files = tokenizer.complete_files(files, checkpoint.path)
        files.pop("vocabulary.json", None)
    elif to == "t5x":
        step = t5x_writing.step_of(checkpoint.path)
        shards, more = t5x_writing.t5x_files(checkpoint.config, checkpoint.architecture, checkpoint.tensors, step)
        write = t5x_writing.write_zarr
    else:
        shards, more = named(split_into_shards(checkpoint.tensors, size, split_stacks=True), native.STEM)
        config_file = native.config_file(checkpoint.config, checkpoint.architecture, checkpoint.huggingface)
        files = {**files, native.CONFIG_FILE: config_file}
    on_open(sum(tensor.nbytes for shard in shards.values() for tensor in shard.values()))
    with freed_memory_returned():
        write_folder(destination, shards, {**files, **more}, source=source, overwrite=overwrite, on_bytes=on_bytes, write=write)
    return destination


def as_floats(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the float model that a quantised one computes with; a float one as it is."""
    if checkpoint.config.weights == "float":
        return checkpoint
    config, tensors = dequantized(checkpoint.config, checkpoint.architecture, checkpoint.tensors)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def export_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Returns the config.json to write for a checkpoint, and its model type.

    Settings of behaviour that Hugging Face does not have (a capacity factor, groups of tokens, ...) become Hugging Face's, and
    the log says which; fields of the architecture it does not have raise a ConfigError. A config.json that the model came with
    and that still says the same is written back as it was.
    """
    config, differing = config_huggingface.with_huggingface_semantics(checkpoint.config)
    if differing:
        log.info("%s", config_huggingface.describe_changes(differing))
    values = config.to_huggingface()
    values["architectures"] = [huggingface.class_name(values["model_type"], checkpoint.architecture)]
    came_with = checkpoint.huggingface
    if came_with is None:
        return values, values["model_type"]
    if (came_with.get("model_type"), values["model_type"]) == ("mt5", "t5") and not config.tie_word_embeddings:
        values |= {"model_type": "mt5", "architectures": [huggingface.class_name("mt5", checkpoint.architecture)]}  # the same model
    if SwitchConfig.from_huggingface(came_with) == SwitchConfig.from_huggingface(values):
        return dict(came_with), came_with.get("model_type", "switch_transformers")
    kept = {key: value for key, value in came_with.items() if key not in _STALE}
    return {**kept, **values}, values["model_type"]


def companion_files(folder: Path) -> dict[str, bytes]:
    """Returns the `COMPANIONS` of a checkpoint, of a run its own.

    Raises `CheckpointError` for a link out of the folder, and `ConfigError` for a vocabulary that is broken.
    """
    place = training_run.vocabulary_folder(folder)
    check_folder(place)
    root = folder if place == folder else place.parent
    files = {name: read_companion(place / name, root) for name in COMPANIONS if (place / name).is_file()}
    tokenizer.load_vocabulary(folder)
    return files


def source_identity(folder: Path) -> list:
    """Returns what changes when a source's files do."""
    if in_store(folder):
        stored: Any = folder  # whose stat is etils' own
        files = sorted(path for path in stored.iterdir() if path.is_file())
        return [str(folder), *([path.name, path.stat().length, path.stat().mtime] for path in files)]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(folder.resolve()), *([str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]
