"""`export`: a checkpoint of any format to the folder that another runtime opens."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flax_switch.config import check, one_of
from flax_switch.convert import native
from flax_switch.convert.checkpoint import Checkpoint, as_floats, companion_files, open_checkpoint, write_checkpoint
from flax_switch.convert.folder import claimed, local_destination, write_folder
from flax_switch.export import FORMATS
from flax_switch.export.dense import write_ctranslate2, write_gguf_ready
from flax_switch.export.onnx import onnx_files
from flax_switch.export.stablehlo import PLATFORMS, stablehlo_files

_ONE_FILE = 10**15 - 1  # bytes: no model is split


def export(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    platforms: Sequence[str] = PLATFORMS,
    changes: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
    **controls: Any,
) -> Path:
    """Exports a checkpoint; the destination appears when it is whole.

    A quantised model keeps its integers in StableHLO, and is elsewhere exported as the floats that they mean.

    Args:
      source, changes, allow_missing, revision, verify: as for `convert.checkpoint.open_checkpoint`.
      destination: a new folder, or with `overwrite` one that holds a model.
      to: one of `FORMATS`; see docs/export.md for what each of them holds.
      platforms: of StableHLO, some of "cpu", "cuda" and "tpu".
      controls: of StableHLO's greedy search, as `generate` has them, such as no_repeat_ngram_size.

    Raises:
      ConfigError: naming what of the model the format cannot hold, and the way out.
      ImportError: naming the extra that is missing.
    """
    one_of("to", to, FORMATS)
    destination = local_destination(destination)
    with claimed(destination):
        checkpoint = open_checkpoint(source, changes=changes, allow_missing=allow_missing, revision=revision, verify=verify)
        options: dict[str, Any] = dict(max_shard_size=_ONE_FILE, overwrite=overwrite, on_bytes=on_bytes, on_open=on_open)
        if to == "stablehlo":
            return _write_stablehlo(checkpoint, destination, platforms, controls, options)
        checkpoint = as_floats(checkpoint)
        check(
            not controls,
            f"{', '.join(controls)}: only programs in StableHLO choose tokens. Tell the other runtime, or leave it out.",
        )
        if to == "onnx":
            return _write_onnx(checkpoint, destination, overwrite)
        return {"ctranslate2": write_ctranslate2, "gguf-ready": write_gguf_ready}[to](checkpoint, destination, **options)


def _write_stablehlo(
    checkpoint: Checkpoint, destination: Path, platforms: Sequence[str], controls: Mapping[str, Any], options: Mapping[str, Any]
) -> Path:
    """Writes a folder of our own, which `load_pretrained` opens as well, with the programs in it."""
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    programs = stablehlo_files(
        checkpoint.config, shapes, architecture=checkpoint.architecture, platforms=platforms, **controls
    )  # fmt: skip
    files = {**companion_files(checkpoint.path), **programs}
    return write_checkpoint(checkpoint, destination, to="flax_switch", files=files, **options)


def _write_onnx(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> Path:
    config = native.config_file(checkpoint.config, checkpoint.architecture, checkpoint.huggingface)
    files = onnx_files(checkpoint.config, checkpoint.tensors, architecture=checkpoint.architecture)
    files |= {"config.json": config, **companion_files(checkpoint.path)}
    write_folder(destination, {}, files, overwrite=overwrite)
    return destination
