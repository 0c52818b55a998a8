"""Users' own text: files, folders and globs of the formats that `data.formats` lists, read as documents or as records.

They may lie in object storage (gs://..., s3://..., see `docs/launching.md`) and on the Hugging Face hub (hf://datasets/...),
ArrayRecord files excepted.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError, check
from flax_switch.data import remote
from flax_switch.data.formats import FORMATS, WITH_FIELDS, Record, Records, describe, kind_of
from flax_switch.host.files import absolute, in_store

_FIRST_FILES = 16  # that are opened for the first documents


def find_files(source: str | tuple[str, ...], known: tuple[str, ...] = tuple(FORMATS), setting: str = "data.source") -> list[Path]:
    """Returns the files that paths, folders (searched through) and globs name, sorted, each once.

    Raises `ConfigError` where a path names nothing or a file whose kind is not among `known`; `setting` is what named it.
    """
    endings = describe(known)
    found: dict[Path, None] = {}
    for pattern in (source,) if isinstance(source, str) else source:
        pattern = remote.located(pattern, setting)
        expanded = os.path.expanduser(pattern)
        if in_store(pattern):
            matches = sorted(path for path in remote.stored_files(pattern) if kind_of(path) in known)
            missing = f"{setting}: {pattern!r} names no file that ends in {endings}, no folder of them and no glob."
            private = " Is there such a data set? For a private one set HF_TOKEN." if remote.on_hub(pattern) else ""
            check(bool(matches), missing + private)
        elif os.path.isdir(expanded):
            matches = sorted(p for p in Path(expanded).rglob("*") if p.is_file() and kind_of(p) in known)
            check(bool(matches), f"The folder {pattern} holds no text: none of its files ends in {endings}.")
        elif os.path.isfile(expanded):
            matches = [Path(expanded)]
        else:
            matches = sorted(p for p in map(Path, glob.glob(expanded, recursive=True)) if p.is_file())
            check(bool(matches), f"{setting}: {pattern!r} is no file or folder, and no file matches it as a glob.")
        for path in matches:
            check(kind_of(path) in known, f"{path} is of no kind that can be read; names must end in {endings}.")
            found[path] = None
    return list(found)


def fingerprint(paths: list[Path], text_field: str, separator: str) -> str:
    """Changes with the files' names, sizes or modification times and with how they are read."""
    digest = hashlib.blake2b(f"{text_field} {separator}".encode(), digest_size=10)
    for path in paths:
        stat: Any = remote.patiently(path, path.stat) if in_store(path) else path.stat()  # in object storage etils' own
        size, time = (stat.length, stat.mtime) if in_store(path) else (stat.st_size, stat.st_mtime_ns)
        digest.update(os.fsencode(f"\n{absolute(path)} {size} {time}"))  # names of files need not be UTF-8
    return digest.hexdigest()


def _size_and_time(path: Any) -> tuple[int, int]:
    if not in_store(path):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    stat = remote.patiently(path, path.stat)  # etils' own
    return stat.length, stat.mtime


def total_bytes(paths: list[Path]) -> int:
    """Returns the size of files, as they are."""
    return sum(_size_and_time(path)[0] for path in paths)


def text_bytes(paths: list[Path]) -> int | None:
    """Returns the size of the text where it is known beforehand: that of plain files of nothing else, such as .txt."""
    plain = all(path.suffix.lower() in FORMATS and not FORMATS[kind_of(path)].fields for path in paths)
    return total_bytes(paths) if plain else None


def documents(paths: list[Path], text_field: str = "text", separator: str = "line") -> Iterator[str]:
    """Yields documents of the files in order, one at a time; empty ones are left out.

    Raises `ConfigError` for bad UTF-8, malformed JSON and rows (file and line), a missing field (and what there is), a damaged
    file, a format whose extra is not installed, and where there is no document in any file.
    """
    empty = True
    for path in paths:
        for text in documents_of(path, text_field, separator):
            empty = False
            yield text
    others = f" and {len(paths) - 1:,} other files" if len(paths) > 1 else ""
    check(not empty, f"There is no text in {paths[0]}{others}: a document needs more than blanks.")


def documents_of(path: Path, text_field: str = "text", separator: str = "line") -> Iterator[str]:
    """Yields the documents of one file, which may have none; raises as `documents` does."""
    form = FORMATS[kind_of(path)]
    if form.fields:
        texts = (_text_of(record, text_field, where) for record, where in form.read(path))
    else:
        texts = form.read(path, separator)
    yield from (text for text in texts if text and not text.isspace())


def first_documents(paths: list[Path], count: int, text_field: str = "text", separator: str = "line") -> Iterator[str]:
    """Yields about `count` documents, the first ones of at most 16 files that lie evenly among all; raises as `documents` does."""
    chosen = paths[:: -(-len(paths) // _FIRST_FILES)]
    for path in chosen:
        yield from itertools.islice(documents_of(path, text_field, separator), -(-count // len(chosen)))


def records(paths: list[Path]) -> Records:
    """Yields (record, where it stands) of files whose formats have fields, for tasks."""
    for path in paths:
        kind = kind_of(path)
        check(kind in WITH_FIELDS, f"{path} has no fields; records are read from {describe(WITH_FIELDS)}.")
        yield from FORMATS[kind].read(path)


def _field_of(record: Record, name: str, where: str) -> object:
    """Returns a record's field. Raises `ConfigError` that names the fields there are."""
    check(name in record, f"{where}: there is no field {name!r}; the fields are: {', '.join(map(str, record)) or 'none'}.")
    return record[name]


def _text_of(record: Record, name: str, where: str) -> str:
    text = _field_of(record, name, where)
    if isinstance(text, str):
        return text
    raise ConfigError(f"{where}: field {name!r} must be text; it is a {type(text).__name__}.")
