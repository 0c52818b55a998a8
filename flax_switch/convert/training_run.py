"""Training checkpoints: the parameters of a run, read out of its Orbax folders block by block.

A run's folder holds `config.json` and `checkpoints/<step>/params`, which `flax_switch.training.checkpoint` wrote. Orbax itself
restores whole trees into memory; tensorstore, on which it stands, opens single tensors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.convert.canonical import architecture_of, canonical_shapes
from flax_switch.convert.doors import check_counts, check_folder
from flax_switch.convert.mapping import SAME_NAMES, to_canonical
from flax_switch.convert.scan import unstack_layers
from flax_switch.convert.tensors import CheckpointError, LazyTensor
from flax_switch.convert.zarr import key_value_store, open_array
from flax_switch.host.json_text import field, parse_json, read_json
from flax_switch.host.manifest import damage

ADAPTER_FILE = "flax_switch_adapter.json"  # marks an adapter's folder
BASE_FILE = "base.json"  # in a run with an adapter: what tells the model that it is trained on from others
_METADATA = "_METADATA"
_PARAMS = "params/"  # what is read of a checkpoint

log = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> Path | None:
    """Returns the step folder that a path means: itself, or the latest complete step of a run or of its `checkpoints`."""
    return next(iter(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the step folders that a path means, the newest first."""
    if (folder / "params" / _METADATA).is_file():
        return [folder]
    for parent in (folder / "checkpoints", folder):
        steps = [path for path in parent.glob("*") if path.name.isdecimal() and (path / "params" / _METADATA).is_file()]
        if steps:
            return sorted(steps, key=lambda path: int(path.name), reverse=True)
    return []


def whole_checkpoint(folder: Path) -> Path:
    """Returns the newest step folder that a path means and whose parameters are as they were written; reads all of them.

    The log names newer ones that are damaged.

    Raises:
      CheckpointError: where none is whole.
    """
    damaged: dict[Path, str] = {}
    for step in _checkpoints(folder):
        found = damage(step, _PARAMS)
        if found is None:
            for bad, what in damaged.items():
                log.warning("The checkpoint %s is damaged (%s); %s is used.", bad, what, step)
            return step
        damaged[step] = found
    listed = "; ".join(f"{step} ({what})" for step, what in damaged.items())
    raise CheckpointError(
        f"No checkpoint is whole: {listed}. Put back a copy of one, or give --no-verify to take the newest as it is."
    )


def is_run(folder: Path) -> bool:
    """Returns whether a folder is a run's, with a checkpoint in it or not yet."""
    try:
        return {"model", "train"} <= read_json(folder / "config.json").keys()
    except ConfigError:
        return False


def adapter_settings(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Returns the settings of the adapter that a run (or one of its steps) trains, and the name of its model; None without one."""
    step = find_checkpoint(folder)
    try:
        values = read_json((folder if step is None else step.parent.parent) / "config.json")
        settings = field(values, "adapter", dict, "config.json", {})
        return (settings, field(values, "init", str, "config.json", "")) if settings.get("rank") else None
    except ConfigError:
        return None


def vocabulary_folder(folder: Path) -> Path:
    """Returns where a checkpoint's vocabulary is: with it, or in the run's own folder for it."""
    run = folder.parent.parent / "vocabulary"
    return run if folder.parent.name == "checkpoints" and run.is_dir() else folder


def read_run(step: Path, *, allow_missing: Sequence[str] = ()) -> tuple[SwitchConfig, str, dict[str, LazyTensor]]:
    """Returns the config, architecture and canonical tensors of a step folder."""
    config_file = step.parent.parent / "config.json"
    check_folder(step, below=True)
    check_folder(config_file.parent)
    if (found := adapter_settings(step)) is not None:
        run = config_file.parent
        raise CheckpointError(
            f"{run} has an adapter alone, of the model {found[1]}. Name that model and the adapter (--checkpoint {found[1]} "
            f"--adapter {run}), or make one model of them: flax-switch convert {run} DST "
            f"--base {found[1]} --merge --to flax_switch."
        )
    tensors = unstack_layers(read_params(step / "params"))
    try:
        values = field(read_json(config_file), "model", dict, str(config_file))
        check_counts(values, tensors, config_file)
        config = SwitchConfig.from_dict(values)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{step} is a training checkpoint, but its run's config cannot be read: {error}") from error
    try:
        return (
            config,
            architecture_of(config),
            to_canonical(tensors, SAME_NAMES, canonical_shapes(config), allow_missing=allow_missing),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{step}: {error}") from None


def read_params(folder: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of an Orbax tree of arrays, by their '/'-joined path."""
    try:
        zarr3, entries = parse_metadata((folder / _METADATA).read_text())
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{folder / _METADATA} is no Orbax metadata: {error}") from error
    base = {"driver": "ocdbt", "base": key_value_store(folder)}
    driver = "zarr3" if zarr3 else "zarr"
    return {
        "/".join(keys): open_array({"driver": driver, "kvstore": {**base, "path": ".".join(keys) + "/"}}, "/".join(keys))
        for keys in entries
    }


def parse_metadata(text: str) -> tuple[bool, list[list[str]]]:
    """Reads from Orbax's metadata whether arrays are zarr 3, and the keys on the way to each of them.

    Raises `ValueError` that quotes what is not known: another store than OCDBT, or entries that are no arrays below named keys.
    """
    metadata = parse_json(text, "the text")
    known = isinstance(metadata, dict) and isinstance(metadata.get("tree_metadata"), dict)
    if not known or metadata.get("use_ocdbt") is not True or not isinstance(metadata.get("use_zarr3"), bool):
        settings = {**metadata, "tree_metadata": "..."} if known else metadata
        raise ValueError(f"expected tree_metadata, use_ocdbt: true and use_zarr3, and got {_shortened(json.dumps(settings))}")
    entries = []
    for name, entry in metadata["tree_metadata"].items():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        if not isinstance(keys, list) or not all(isinstance(key, dict) and isinstance(key.get("key"), str) for key in keys):
            raise ValueError(f"expected key_metadata with a key for each level, and got {_shortened(json.dumps({name: entry}))}")
        entries.append([key["key"] for key in keys])
    return metadata["use_zarr3"], entries


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
