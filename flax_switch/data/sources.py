"""Users' own text: files, folders and globs of .txt, .jsonl, their .gz forms, .parquet and .arrayrecord, read as documents.

They may lie in object storage (gs://..., s3://..., see `docs/launching.md`), ArrayRecord files excepted.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.data.files import absolute, in_store

TEXT, JSONL, PARQUET, ARRAYRECORD = (".txt",), (".jsonl", ".ndjson"), (".parquet",), (".arrayrecord", ".array_record")
TABLES = (".tsv", ".csv")  # of tasks only
_KNOWN = (*TEXT, *JSONL, *PARQUET, *ARRAYRECORD)
_COMPRESSED = (*TEXT, *JSONL, *TABLES)  # which may have .gz after it


def find_files(source: str | tuple[str, ...], known: tuple[str, ...] = _KNOWN, setting: str = "data.source") -> list[Path]:
    """The files that paths, folders (searched through) and globs name, sorted, each once.

    Raises `ConfigError` where a path names nothing or a file whose kind is not among `known`; `setting` is what named it.
    """
    compressed = "".join(f" or {kind}.gz" for kind in known if kind in _COMPRESSED)
    endings = ", ".join(known)
    found: dict[Path, None] = {}
    for pattern in (source,) if isinstance(source, str) else source:
        expanded = os.path.expanduser(pattern)
        if in_store(pattern):
            matches: list[Any] = sorted(path for path in _stored_files(pattern) if kind_of(path) in known)
            check(bool(matches), f"{setting}: {pattern!r} names no file that ends in {endings}, no folder of them and no glob.")
        elif os.path.isdir(expanded):
            matches = sorted(p for p in Path(expanded).rglob("*") if p.is_file() and kind_of(p) in known)
            check(bool(matches), f"The folder {pattern} holds no text: none of its files ends in {endings}.")
        elif os.path.isfile(expanded):
            matches = [Path(expanded)]
        else:
            matches = sorted(p for p in map(Path, glob.glob(expanded, recursive=True)) if p.is_file())
            check(bool(matches), f"{setting}: {pattern!r} is no file or folder, and no file matches it as a glob.")
        for path in matches:
            check(
                kind_of(path) in known,
                f"{path} is of no kind that can be read; names must end in {endings}{compressed}.",
            )
            found[path] = None
    return list(found)


def _stored_files(pattern: str) -> Iterator[epath.Path]:
    """The files in object storage that a path, a folder (searched through) or a glob without ** names."""
    path = epath.Path(pattern)
    if not path.exists():
        yield from path.parent.glob(path.name)
    elif path.is_dir():
        for entry in path.iterdir():
            yield from _stored_files(str(entry))
    else:
        yield path


def kind_of(path: Path | epath.Path) -> str:
    """The ending that says how a file is read, without .gz where it may be compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def fingerprint(paths: list[Path], text_field: str, separator: str) -> str:
    """Changes with the files' names, sizes or modification times and with how they are read."""
    digest = hashlib.blake2b(f"{text_field} {separator}".encode(), digest_size=10)
    for path in paths:
        stat: Any = path.stat()  # in object storage etils' own
        size, time = (stat.length, stat.mtime) if in_store(path) else (stat.st_size, stat.st_mtime_ns)
        digest.update(f"\n{absolute(path)} {size} {time}".encode())
    return digest.hexdigest()


def total_bytes(paths: list[Path]) -> int | None:
    """The size of the text where it is known beforehand: that of plain .txt files."""
    plain = all(path.suffix.lower() in TEXT for path in paths)
    return sum(epath.Path(path).stat().length for path in paths) if plain else None


def documents(paths: list[Path], text_field: str = "text", separator: str = "line") -> Iterator[str]:
    """Documents of the files in order, one at a time; empty ones are left out.

    Raises `ConfigError` for bad UTF-8 and malformed JSON (file and line), a missing field (and what there is), a damaged file
    or a format whose extra is not installed.
    """
    for path in paths:
        kind = kind_of(path)
        if kind in TEXT:
            texts = lines(path) if separator == "line" else _paragraphs(path)
        else:
            texts = (_text_of(record, text_field, where) for record, where in _RECORDS[kind](path))
        for text in texts:
            if text and not text.isspace():
                yield text


def records(paths: list[Path]) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where it stands) of .jsonl, parquet and ArrayRecord files, for tasks with several fields."""
    for path in paths:
        check(
            kind_of(path) in _RECORDS,
            f"{path} has no fields; records are read from .jsonl, .jsonl.gz, .parquet and .arrayrecord.",
        )
        yield from _RECORDS[kind_of(path)](path)


def field_of(record: dict[str, Any], name: str, where: str) -> Any:
    """A record's field. Raises `ConfigError` that names the fields there are."""
    check(name in record, f"{where}: there is no field {name!r}; the fields are: {', '.join(map(str, record)) or 'none'}.")
    return record[name]


def _text_of(record: dict[str, Any], name: str, where: str) -> str:
    text = field_of(record, name, where)
    check(isinstance(text, str), f"{where}: field {name!r} must be text; it is a {type(text).__name__}.")
    return text


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends. Raises `ConfigError` that says where it is not UTF-8."""
    for number, line in enumerate(_raw_lines(path), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}, line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8. Convert "
                "the file to UTF-8, for instance with `iconv`."
            ) from error
        yield text.rstrip("\r\n")


def _paragraphs(path: Path) -> Iterator[str]:
    block: list[str] = []
    for line in lines(path):
        if line and not line.isspace():
            block.append(line.strip())
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _raw_lines(path: Path) -> Iterator[bytes]:
    with _readable(path), _open(path) as file:
        yield from file


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked
        else:
            yield file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is damaged or is no gzip file: {error}.") from error
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error


def _json_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(lines(path), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error.msg} at character {error.colno}).") from error
        check(isinstance(record, dict), f"{where}: a line must be a JSON object; it is a {type(record).__name__}.")
        yield record, where


def _parquet_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"Reading {path} needs pyarrow: pip install 'flax_switch[parquet]'.") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            row = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield record, f"{path}, row {row}"
    except (ArrowException, OSError) as error:
        raise ConfigError(f"Cannot read {path} as parquet: {error}.") from error


def _array_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """ArrayRecord files whose records are JSON objects."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise ConfigError(f"Reading {path} needs array-record: pip install 'flax_switch[arrayrecord]'.") from error
    check(not in_store(path), f"{path}: ArrayRecord files are read from disks; copy it to one, or use .parquet or .jsonl.gz.")
    reader = ArrayRecordReader(str(path))
    try:
        for number in range(reader.num_records()):
            where = f"{path}, record {number + 1}"
            content = reader.read([number])[0]
            try:
                record = json.loads(content)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ConfigError(f"{where}: records must be JSON objects in UTF-8 ({error}).") from error
            check(isinstance(record, dict), f"{where}: records must be JSON objects; this is a {type(record).__name__}.")
            yield record, where
    finally:
        reader.close()


_RECORDS: dict[str, Callable[[Path], Iterator[tuple[dict[str, Any], str]]]] = {
    **dict.fromkeys(JSONL, _json_records),
    **dict.fromkeys(PARQUET, _parquet_records),
    **dict.fromkeys(ARRAYRECORD, _array_records),
}
