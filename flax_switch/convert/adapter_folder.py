"""Adapters on disk: in a folder of ours, in a run, or in PEFT's folder (`convert/peft.py`).

    flax_switch_adapter.json    format_version, the settings, kernels whose rank or alpha is another, the model it was trained on
    adapter.safetensors         a, b and magnitude of each kernel, by its canonical path

A run has the latter in its checkpoints, and base.json with the former's fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from flax_switch.config import ConfigError, SwitchConfig, check, one_of
from flax_switch.config.adapter import ADAPTER, AdapterConfig
from flax_switch.config.ranges import LARGEST_FLOAT, shown
from flax_switch.convert import checkpoint as checkpoints
from flax_switch.convert import peft, training_run
from flax_switch.convert.adapter import Adapter, Ranks, check_base, check_fits, merged, uniform
from flax_switch.convert.doors import check_folder, read_companion, readable
from flax_switch.convert.folder import DEFAULT_SHARD_SIZE, claimed, local_destination, write_folder
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.scan import unstack_layers
from flax_switch.convert.tensors import CheckpointError
from flax_switch.convert.training_run import ADAPTER_FILE as CONFIG_FILE
from flax_switch.host.json_text import field, read_json

STEM = "adapter"
FORMAT_VERSION = 1
FORMATS = ("peft", "flax_switch")  # those that can be written


def adapter_format(folder: Path) -> str | None:
    """Returns the format of the adapter in a folder: "flax_switch", "peft", or "orbax" for a run's; None where there is none."""
    check_folder(folder)
    if (folder / CONFIG_FILE).is_file():
        return "flax_switch"
    if (folder / peft.CONFIG_FILE).is_file():
        return "peft"
    return "orbax" if training_run.adapter_settings(folder) is not None else None


def open_adapter(folder: str | Path, config: SwitchConfig, architecture: str = "full", *, verify: bool = True) -> Adapter:
    """Opens the adapter in a folder for a model; reads headers.

    Raises:
      CheckpointError: where there is none, it is damaged, or has kernels that the model has not, by their names.
    """
    folder = Path(folder)
    with readable(folder):
        return _opened(folder, config, architecture, verify)


def open_adapter_of(folder: str | Path, opened: checkpoints.Checkpoint, *, verify: bool = True) -> Adapter:
    """Opens the adapter in a folder for a checkpoint whose headers are read; raises as `open_adapter`, and for another model."""
    adapter = open_adapter(folder, opened.config, opened.architecture, verify=verify)
    check_base(folder, adapter, opened.tensors, opened.config)
    return adapter


def _opened(folder: Path, config: SwitchConfig, architecture: str, verify: bool) -> Adapter:
    format = adapter_format(folder)
    if format is None:
        raise CheckpointError(
            f"{folder} holds no adapter that is known: no {CONFIG_FILE}, no {peft.CONFIG_FILE} (PEFT), and no run with one."
        )
    if format == "peft":
        return peft.read_peft(folder, config, architecture)
    adapter = read_native(folder) if format == "flax_switch" else read_run(folder, verify=verify)
    check_fits(folder, adapter, config, architecture)
    return adapter


def read_native(folder: Path) -> Adapter:
    """Reads a folder of ours, whatever model it is for."""
    values, where = read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE)
    try:
        version = field(values, "format_version", int, where)
        check(version == FORMAT_VERSION, f"{where} has format_version {version}; this release reads {FORMAT_VERSION}.")
        config = AdapterConfig.from_dict(field(values, "config", dict, where))
        check(config.rank > 0, f"{where}: config.rank is 0, and an adapter's is at least 1.")
        base, fingerprint = field(values, "base", str, where), _numbers(values, "fingerprint", where)
        kernels = {path: _ranks(path, one, where) for path, one in field(values, "kernels", dict, where).items()}
    except ConfigError as error:
        raise CheckpointError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    adapter = uniform(config, read_safetensors(folder / f"{STEM}.safetensors"), base, fingerprint)
    return dataclasses.replace(adapter, kernels={**adapter.kernels, **kernels})


def _ranks(path: str, values: Any, where: str) -> Ranks:
    """Returns the ranks and alphas of a kernel's members."""
    where = f"{where}: the entry of {path} in kernels"
    check(isinstance(values, dict), f"{where} must be an object; it is {shown(values)}.")
    ranks, alphas = (_numbers(values, name, where) for name in ("ranks", "alphas"))
    check(
        any(ranks) and all(rank in range(2**20) for rank in ranks),
        f"{where}: ranks must be whole numbers, not all 0; they are {shown(values['ranks'])}.",
    )
    return Ranks(tuple(map(int, ranks)), alphas)


def _numbers(values: Mapping[str, Any], name: str, where: str) -> tuple[float, ...]:
    """Returns the finite numbers that a field lists."""
    found = field(values, name, list, where)
    right = all(type(number) in (int, float) and abs(number) <= LARGEST_FLOAT for number in found)
    check(right, f"{where}: {name} must be a list of numbers; it is {shown(found)}.")
    return tuple(map(float, found))


def read_run(folder: Path, *, verify: bool = True) -> Adapter:
    """Reads the adapter that a run trains."""
    settings, base = training_run.adapter_settings(folder) or ({}, "")
    step = training_run.whole_checkpoint(folder) if verify else training_run.find_checkpoint(folder)
    if step is None:
        raise CheckpointError(f"{folder} is a run with an adapter, without a complete checkpoint yet; wait for its first.")
    check_folder(step, below=True)
    tensors = training_run.read_params(step / "params")
    tensors = unstack_layers({name.removeprefix(f"{ADAPTER}/"): tensor for name, tensor in tensors.items()})
    return uniform(AdapterConfig.from_dict(settings), tensors, base, read_fingerprint(step.parent.parent))


def read_fingerprint(run: epath.PathLike) -> tuple[float, ...]:
    """Returns what tells the model that a run's adapter is trained on from others."""
    path = epath.Path(run) / training_run.BASE_FILE
    return _numbers(read_json(path), "fingerprint", str(path)) if path.is_file() else ()


def write_adapter(
    destination: str | Path,
    adapter: Adapter,
    config: SwitchConfig,
    *,
    format: str = "peft",
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes an adapter of a model into a folder, which appears when it is whole. format: "peft" or "flax_switch".

    Raises:
      CheckpointError: for kernels that PEFT has no names for; the message names them.
    """
    one_of("format", format, FORMATS)
    destination, files = local_destination(destination), dict(files or {})
    if format == "peft":
        stem = peft.STEM
        tensors, files[peft.CONFIG_FILE] = peft.peft_tensors(adapter, config)
    else:
        stem, tensors = STEM, dict(adapter.tensors)
        files[CONFIG_FILE] = _config_file(adapter)
    with claimed(destination):
        write_folder(destination, {f"{stem}.safetensors": tensors}, files, overwrite=overwrite)
    return destination


def _config_file(adapter: Adapter) -> bytes:
    config = adapter.config
    usual = lambda found: set(found.ranks) == {config.rank} and set(found.alphas) == {config.alpha}  # noqa: E731
    values = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "kernels": {path: dataclasses.asdict(found) for path, found in adapter.kernels.items() if not usual(found)},
        "base": adapter.base,
        "fingerprint": list(adapter.fingerprint),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def convert_adapter(
    source: str | Path,
    destination: str | Path,
    base: str | Path,
    *,
    to: str,
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    verify: bool = True,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
) -> Path:
    """Converts an adapter, or merges it into the model that it is for.

    Args:
      source: a folder of ours or PEFT's, or a run. What it wants before inputs goes with it.
      base: the model, as for `open_checkpoint`.
      to: "huggingface" or "flax_switch"; an adapter in the first is PEFT's folder.
      merge: write the whole model, with the adapter in its kernels.
      dtype, max_shard_size, overwrite, revision, verify, on_bytes, on_open: as for `convert`.

    Raises:
      CheckpointError: where the adapter is another model's.
    """
    one_of("to", to, checkpoints.FORMATS)
    opened = checkpoints.open_checkpoint(base, revision=revision, verify=verify)
    adapter = open_adapter_of(source, opened, verify=verify)
    adapter = adapter if adapter.base else dataclasses.replace(adapter, base=str(base))
    wanted = Path(source) / "generation_config.json"
    files = {wanted.name: read_companion(wanted, wanted.parent)} if wanted.is_file() else {}
    if not merge:
        check(dtype is None, "dtype is of a whole model's tensors; give merge (--merge) with it, or leave it out.")
        format = "peft" if to == "huggingface" else to
        return write_adapter(destination, adapter, opened.config, format=format, files=files, overwrite=overwrite)
    destination = local_destination(destination)
    whole = dataclasses.replace(opened, tensors=merged(adapter, opened.config, opened.tensors))
    identity = [checkpoints.source_identity(opened.path), checkpoints.source_identity(Path(source))]
    with claimed(destination):
        return checkpoints.write_checkpoint(
            whole if dtype is None else checkpoints.with_dtype(whole, dtype),
            destination,
            to=to,
            files={**checkpoints.companion_files(opened.path), **files},
            max_shard_size=max_shard_size,
            source=identity,
            overwrite=overwrite,
            on_bytes=on_bytes,
            on_open=on_open,
        )
