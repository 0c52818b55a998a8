"""The safetensors file format, read and written tensor by tensor.

The format is a length, a JSON header and the raw bytes. The safetensors library maps a whole file into memory to read it and
takes a whole file's tensors at once to write it; conversion needs blocks of a tensor in and out, so both sides are here. Headers
are checked as strictly as the library does: sizes, dtypes, offsets, holes and overlaps.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flax_switch.config import ConfigError
from flax_switch.config.ranges import shown
from flax_switch.convert.tensors import CheckpointError, Index, LazyTensor, contiguous
from flax_switch.host.files import in_store
from flax_switch.host.json_text import parse_json

MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a file, by name; only its header is read now.

    Raises:
      CheckpointError: if the file is truncated, its header too large or not what the format asks for.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is no complete safetensors file: it has {size} bytes and announces a header of {length}. "
                "It is truncated or corrupt; fetch it again."
            )
        header = _parse_header(path, file.read(length))
    header.pop("__metadata__", None)
    begin, tensors, ranges = 8 + length, {}, []
    for name, entry in header.items():
        dtype, shape, (start, stop) = _check_entry(path, name, entry)
        ranges.append((start, stop, name))
        tensors[name] = LazyTensor(shape, dtype, _reader(path, begin + start, shape, dtype))
    position = 0
    for start, stop, name in sorted(ranges):
        if start != position:
            raise CheckpointError(f"{path}: the bytes of {name!r} start at {start}, the tensor before ends at {position}")
        position = stop
    if begin + position != size:
        raise CheckpointError(
            f"{path} should have {begin + position} bytes, by its header, and has {size}. It is truncated or corrupt."
        )
    return tensors


def _parse_header(path: Path, text: bytes) -> dict:
    try:
        header = parse_json(text, f"{path} is corrupt, its header")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is no JSON object")
    return header


def _check_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        sane = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and start <= stop
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path} is corrupt: the header's entry for {name!r} is {shown(entry)}") from None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(_DTYPES)}")
    if not sane or stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path} is corrupt: {name!r}, {entry['dtype']} {list(shape)}, has bytes {start} to {stop}")
    return dtype, shape, (start, stop)


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        return read_block(path, offset, shape, dtype, index)

    return read


def read_block(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, index: Index) -> np.ndarray:
    """Returns a block of a row-major tensor stored at `offset`: the rows are read from the file, the other axes sliced."""
    row = math.prod(shape[1:]) * dtype.itemsize
    start, stop = (index[0].start, index[0].stop) if shape else (0, 1)
    if in_store(path):
        with path.open("rb") as file:
            file.seek(offset + start * row)
            data = np.frombuffer(file.read((stop - start) * row), np.uint8)
    else:
        watch = _WATCH.get()
        with path.open("rb") as file:
            if watch is not None and hasattr(os, "posix_fadvise"):  # or the system reads on behind what is asked for
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            data = np.fromfile(file, np.uint8, count=(stop - start) * row, offset=offset + start * row)
            if watch is not None:
                watch.note(path, os.fstat(file.fileno()), data.size)
    if data.size != (stop - start) * row:
        raise CheckpointError(f"{path} is truncated: {(stop - start) * row} bytes expected at {offset + start * row}")
    block = data.view(dtype)
    return block.reshape(stop - start, *shape[1:])[(slice(None), *index[1:])] if shape else block.reshape(())


@dataclasses.dataclass
class Watch:
    """Files as they were when they were opened first, and how many bytes were read of them since."""

    files: Mapping[str, tuple[int, ...]]
    bytes: int = 0

    def note(self, path: Path, status: os.stat_result, size: int) -> None:
        """Counts bytes that were read; raises `CheckpointError` where the file is another by now."""
        if self.files.get(str(path)) != identity(status):
            raise CheckpointError(f"{path} has changed since the model was opened; load the model again")
        self.bytes += size


_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Returns what tells a file from another of its name, and from itself after it was written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextlib.contextmanager
def watched(files: Mapping[str, tuple[int, ...]]) -> Iterator[Watch]:
    """Yields the watch over what this thread reads from local files: they must have these identities."""
    watch = Watch(files)
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None] = lambda n: None) -> None:
    """Writes tensors to a file, reading and writing one block at a time.

    Args:
      tensors: by name. They are laid out by size of their dtype, then name, so that every tensor is aligned.
      on_bytes: called with the number of bytes after each block.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers opens no file without it
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
        stop = position + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            written = 0
            for block in tensors[name].blocks():
                data = contiguous(block).reshape(-1).view(np.uint8)
                file.write(data.data)
                written += data.size
                on_bytes(data.size)
            if written != tensors[name].nbytes:
                raise CheckpointError(f"tensor {name!r} gave {written} bytes where its shape asks for {tensors[name].nbytes}")
        file.flush()
        os.fsync(file.fileno())  # a file with its final name must have its bytes
