"""transformers 4's flax_model.msgpack: flax.serialization's format, walked through without building what it says.

A file is msgpack: maps by name down to arrays, each an extension of type 1 that holds (shape, dtype's name, bytes); an array above
1 GiB is a map of flat chunks. Only the places of the arrays are noted, and blocks are read from there: nothing is unpickled, and no
number in the file decides how much memory is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_switch.convert.mapping import TRANSPOSE
from flax_switch.convert.safetensors_file import read_block
from flax_switch.convert.tensors import DTYPES, CheckpointError, Index, LazyTensor, concatenate

_ARRAY = 1  # flax.serialization's number of the extension type for arrays
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 32  # levels of names; a T5 has eight
_MAX_NAME = 2**16  # bytes
# The first byte of each kind of value, and how many bytes of length follow it.
_MAPS = {0xDE: 2, 0xDF: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_INTEGERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

Leaf = LazyTensor | int


def read_flax_msgpack(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a file under PyTorch's names and in PyTorch's layout, unread.

    Raises:
      CheckpointError: if the file is truncated, or holds anything but arrays by name.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in read_tree(path).items():
        torch_name, kernel = pytorch_name(name)
        tensors[torch_name] = TRANSPOSE.to_foreign(tensor) if kernel and len(tensor.shape) == 2 else tensor
    return tensors


def pytorch_name(path: str) -> tuple[str, bool]:
    """Turns "a/b/kernel" or "a/b/embedding" into "a.b.weight", and says whether it is a kernel, which PyTorch stores transposed."""
    *parents, last = path.split("/")
    return ".".join([*parents, "weight" if last in ("kernel", "embedding") else last]), last == "kernel"


def read_tree(path: Path) -> dict[str, LazyTensor]:
    """Returns the arrays of a file by their '/'-joined path, unread."""
    with path.open("rb") as file:
        walk = _Walk(path, file)
        leaves = dict(walk.tree("", 0))
        if file.tell() != walk.size:
            raise walk.corrupt("bytes follow the last array")
    return _joined(path, leaves)


def _joined(path: Path, leaves: dict[str, Leaf]) -> dict[str, LazyTensor]:
    """Returns the arrays with those in chunks put together."""
    chunked = {name.removesuffix(f"/{_CHUNKED}") for name in leaves if name.endswith(f"/{_CHUNKED}")}
    tensors: dict[str, LazyTensor] = {name: _unchunked(path, name, leaves) for name in chunked}
    for name, leaf in leaves.items():
        if any(name.startswith(f"{whole}/") for whole in chunked):
            continue
        if isinstance(leaf, int):
            raise CheckpointError(f"{path}: {name!r} is a number where an array was expected. Only models' parameters are read.")
        tensors[name] = leaf
    return tensors


def _unchunked(path: Path, name: str, leaves: dict[str, Leaf]) -> LazyTensor:
    sizes, chunks = _numbered(leaves, f"{name}/shape"), _numbered(leaves, f"{name}/chunks")
    shape = tuple(size for size in sizes if isinstance(size, int))
    parts = [part for part in chunks if isinstance(part, LazyTensor) and len(part.shape) == 1]
    fits = len(shape) == len(sizes) and parts and len(parts) == len(chunks) and len({part.dtype for part in parts}) == 1
    if not fits or math.prod(shape) != sum(part.shape[0] for part in parts):
        raise CheckpointError(f"{path} is corrupt: the chunks of {name!r} do not make an array of its shape. Fetch it again.")
    return _reshaped(concatenate(parts), shape)


def _numbered(leaves: dict[str, Leaf], prefix: str) -> list[Leaf]:
    """Returns the leaves `prefix/0`, `prefix/1`, ... as far as there are any."""
    found: list[Leaf] = []
    while f"{prefix}/{len(found)}" in leaves:
        found.append(leaves[f"{prefix}/{len(found)}"])
    return found


def _reshaped(flat: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    row = math.prod(shape[1:])

    def read(index: Index) -> np.ndarray:
        start, stop = index[0].start, index[0].stop
        rows = flat.read((slice(start * row, stop * row),)).reshape(stop - start, *shape[1:])
        return rows[(slice(None), *index[1:])]

    return LazyTensor(shape, flat.dtype, read)


class _Walk:
    """Goes through a msgpack file from value to value; every length is checked against the file's."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def corrupt(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no flax_model.msgpack, or is truncated: {why} at byte {self.file.tell()} of {self.size}. "
            "Fetch it again."
        )

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.corrupt("it ends too early")
        return data

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def length(self, first: int, fixed: range, sized: dict[int, int], what: str) -> int:
        """Reads how long a value is: a few lengths stand in its first byte, others follow it."""
        if first in fixed:
            return first - fixed.start
        if first not in sized:
            raise self.corrupt(f"{what} was expected and 0x{first:02x} found")
        return self.number(sized[first])

    def tree(self, prefix: str, depth: int) -> Iterator[tuple[str, Leaf]]:
        """Yields the leaves of the map that begins here."""
        if depth > _MAX_DEPTH:
            raise self.corrupt(f"names are more than {_MAX_DEPTH} levels deep")
        seen = set()
        for _ in range(self.length(self.number(1), range(0x80, 0x90), _MAPS, "a map of names")):
            name = self.name()
            if name in seen:
                raise self.corrupt(f"{prefix}{name} comes twice")
            seen.add(name)
            yield from self.value(f"{prefix}{name}", depth)

    def name(self) -> str:
        count = self.length(self.number(1), range(0xA0, 0xC0), _TEXTS, "a name")
        if count > _MAX_NAME:
            raise self.corrupt("a name is too long")
        try:
            name = self.take(count).decode()
        except UnicodeDecodeError:
            raise self.corrupt("a name is no UTF-8") from None
        if not name or "/" in name:
            raise self.corrupt(f"{name!r} is no name of a parameter")
        return name

    def value(self, name: str, depth: int) -> Iterator[tuple[str, Leaf]]:
        first = self.number(1)
        if first in _EXTENSIONS or first in _FIXED_EXTENSIONS:
            count = _FIXED_EXTENSIONS.get(first) or self.number(_EXTENSIONS[first])
            yield name, self.array(name, count)
        elif first in _INTEGERS or first < 0x80 or first == 0xC3:  # 0xc3: true, which marks an array in chunks
            yield name, 1 if first == 0xC3 else self.integer(first)
        else:
            self.file.seek(-1, os.SEEK_CUR)
            yield from self.tree(f"{name}/", depth + 1)

    def integer(self, first: int) -> int:
        return self.length(first, range(0x80), _INTEGERS, "a size")

    def array(self, name: str, count: int) -> LazyTensor:
        """Reads the array of an extension of `count` bytes: msgpack of shape, dtype and contents."""
        if self.number(1) != _ARRAY:
            raise self.corrupt(f"{name!r} is no array")
        end = self.file.tell() + count
        if self.length(self.number(1), range(0x90, 0xA0), _LISTS, "an array's shape, dtype and contents") != 3:
            raise self.corrupt(f"{name!r} is no array")
        rank = self.length(self.number(1), range(0x90, 0xA0), _LISTS, "a shape")
        if rank > _MAX_DEPTH:
            raise self.corrupt(f"{name!r} has {rank} axes")
        shape = tuple(self.integer(self.number(1)) for _ in range(rank))
        dtype = self.dtype(name)
        nbytes = self.length(self.number(1), range(0), _BYTES, "an array's contents")
        offset = self.file.tell()
        if nbytes != math.prod(shape) * dtype.itemsize or offset + nbytes != end or end > self.size:
            raise self.corrupt(f"{name!r}, {dtype} {list(shape)}, has {nbytes} bytes and does not fit")
        self.file.seek(end)
        return LazyTensor(shape, dtype, _reader(self.path, offset, shape, dtype))

    def dtype(self, name: str) -> np.dtype:
        count = self.length(self.number(1), range(0xA0, 0xC0), _TEXTS, "a dtype")
        text = self.take(min(count, _MAX_NAME)).decode(errors="replace")
        if text not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has dtype {text[:40]!r}; known are {', '.join(DTYPES)}")
        return DTYPES[text]


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> Any:
        return read_block(path, offset, shape, dtype, index)

    return read
