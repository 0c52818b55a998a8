"""What may be opened in a model's folder: regular files, and for files that are copied on, only the folder's own."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError
from flax_switch.convert.tensors import CheckpointError, LazyTensor
from flax_switch.host.files import in_store

MAX_COMPANION_BYTES = 2**29  # tokenizers have megabytes
_FEW = 1024  # layers or experts that a config may name whatever the file holds: they cost nothing

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_COUNTS = ("num_layers", "num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_experts")


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what the operating system says about a file of the folder, if it cannot be read, into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"Cannot read {error.filename or folder}: {error.strerror or error}.") from error


@contextlib.contextmanager
def config_of(path: Path) -> Iterator[None]:
    """Turns what is wrong with a checkpoint's own config into `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_folder(folder: Path, *, below: bool = False) -> None:
    """Raises where a folder (or, with `below`, any under it) holds what is neither file nor folder, before any is opened.

    Links are followed: one to a device is a device. One that leads nowhere is no matter here.
    """
    if in_store(folder) or not folder.is_dir():
        return
    for path in folder.iterdir():
        mode = _mode(path)
        kind = next((what for test, what in _KINDS if test(mode)), None)
        if kind is not None:
            raise CheckpointError(f"{path} is {kind}: a model's folder holds regular files. Remove it, or fetch the model again.")
        if below and stat.S_ISDIR(mode) and not path.is_symlink():
            check_folder(path, below=True)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:  # a link to nowhere or in a circle
        return 0


def read_companion(path: Path, folder: Path) -> bytes:
    """Returns the contents of a file that is copied into an export.

    A link may lead to another file of `folder`, or, where that is a snapshot in the Hugging Face hub's cache, to its blobs. Any
    other would copy whatever file of this machine it names.

    Raises:
      CheckpointError: for such a link, or a file too large for what it is.
    """
    with readable(folder):
        return _own_bytes(path, folder)


def _own_bytes(path: Path, folder: Path) -> bytes:
    if not in_store(path):
        real, root = path.resolve(), folder.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not real.is_relative_to(root) and not real.is_relative_to(blobs):
            raise CheckpointError(
                f"{path} is a link out of the folder, to {real}: it would be copied with the model. Put the file itself there."
            )
        if real.stat().st_size > MAX_COMPANION_BYTES:
            raise CheckpointError(f"{path} has {real.stat().st_size} bytes, too many for what it should be. Fetch the model again.")
    return path.read_bytes()


def check_counts(values: Any, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Raises for a config that names more layers or experts than its tensors can make up, before anything is built for each.

    Other sizes are compared with the tensors' shapes, which is arithmetic.
    """
    layers = max(_FEW, len(tensors))
    experts = max([layers, *(tensor.shape[0] for tensor in tensors.values() if tensor.shape)])  # they may be stacked
    for name in _COUNTS:
        value = values.get(name) if isinstance(values, Mapping) else None
        if isinstance(value, (int, float)) and value > (experts if name == "num_experts" else layers):
            raise CheckpointError(
                f"{where} has {name}={str(value)[:20]}, and {len(tensors)} tensors beside it: too few to hold that many. One of "
                "the two is not of this model; fetch it again."
            )
