"""Formats of text files: one table from a file's ending to what reads it, for pre-training's text and fine-tuning's tasks."""

from __future__ import annotations

import contextlib
import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.data.packed import COMPRESSIONS, ending_of, explained, lines, opened
from flax_switch.host.files import in_store
from flax_switch.host.json_text import json_object, parse_json

Record = dict[Any, Any]
Records = Iterator[tuple[Record, str]]  # (record, where it stands: file and line, row or item)

_LONGEST_FIELD = 100_000_000  # characters of a table's field; a quote that is never closed is noticed there
csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))  # Python's own limit is 131,072: shorter than many a document


class Format(NamedTuple):
    """How files of one ending are read."""

    read: Callable[..., Iterator[Any]]  # of a path: its `Records`; without fields, of a path and data.document_separator: texts
    fields: bool = True
    packed: bool = True  # whether .gz or .zst may follow


# --- documents
def _documents_of_text(path: Path, separator: str) -> Iterator[str]:
    return lines(path) if separator == "line" else _paragraphs(path)


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


def _whole(path: Path, separator: str) -> Iterator[str]:
    yield "\n".join(lines(path)).strip()


# --- JSON
def _json_lines(path: Path, hint: str = "") -> Records:
    for number, line in enumerate(lines(path), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        yield json_object(line, where, hint, "a line"), where


def _json(path: Path) -> Records:
    """Yields one array of objects, held in memory as a whole; or JSON lines, as in C4's files."""
    hint = " A .json file is one array of objects, or has an object on every line."
    with opened(path) as file:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        yield from _json_lines(path, hint)
        return
    for number, record in enumerate(parse_json("\n".join(lines(path)), str(path), hint), start=1):
        where = f"{path}, item {number}"
        check(isinstance(record, dict), f"{where}: an item must be a JSON object; it is a {type(record).__name__}.{hint}")
        yield record, where


# --- tables
def table_rows(path: Path, *, header: bool = True) -> Records:
    """Yields rows of a .csv or .tsv file by the names in its first row, or by number where it has no header.

    In .tsv files quotes are characters like others, as the tools that write them have it.
    """
    tabs = kind_of(path) == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader((line + "\n" for line in lines(path)), **options)
    names: list[Any] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{where}: this is no row of a {'.tsv' if tabs else '.csv'} file ({error}).") from error
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = row if header else list(range(len(row)))
            twice = sorted({name for name in names if name and names.count(name) > 1}) if header else []
            check(not twice, f"{where}: the first row names columns twice: {shown(', '.join(twice), str)}. Give each its own name.")
            if header:
                continue
        check(
            len(row) == len(names),
            f"{where}: the row has {len(row)} columns, but the first one has {len(names)}."
            + ("" if tabs else " A field with a comma needs quotes around it."),
        )
        yield dict(zip(names, row, strict=True)), where


# --- columns and records that others' packages read
def _parquet(path: Path) -> Records:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"Reading {path} needs pyarrow: pip install 'flax_switch[parquet]'.") from error
    with _seekable(path) as source, explained(f"{path} as parquet"), parquet.ParquetFile(source) as file:
        row = 0
        for batch in file.iter_batches(batch_size=1024):
            batch.validate(full=True)
            for record in batch.to_pylist():
                row += 1
                yield record, f"{path}, row {row}"


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that can be read from its end, as parquet is; a compressed one is unpacked into a temporary file."""
    with opened(path) as file:
        if not ending_of(path):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            yield unpacked


def _array_records(path: Path) -> Records:
    """Yields ArrayRecord files whose records are JSON objects."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise ConfigError(f"Reading {path} needs array-record: pip install 'flax_switch[arrayrecord]'.") from error
    check(not in_store(path), f"{path}: ArrayRecord files are read from disks; copy it to one, or use .parquet or .jsonl.gz.")
    with explained(f"{path} as ArrayRecord"), contextlib.closing(ArrayRecordReader(str(path))) as reader:
        for number in range(reader.num_records()):
            where = f"{path}, record {number + 1}"
            yield json_object(reader.read([number])[0], f"{where}: records must be JSON objects"), where


FORMATS: dict[str, Format] = {
    ".txt": Format(_documents_of_text, fields=False),
    ".md": Format(_whole, fields=False),
    ".json": Format(_json),
    ".jsonl": Format(_json_lines),
    ".ndjson": Format(_json_lines),
    ".csv": Format(table_rows),
    ".tsv": Format(table_rows),
    ".parquet": Format(_parquet),
    ".arrayrecord": Format(_array_records, packed=False),
    ".array_record": Format(_array_records, packed=False),
}
TABLES = tuple(kind for kind, form in FORMATS.items() if form.read is table_rows)
WITH_FIELDS = tuple(kind for kind, form in FORMATS.items() if form.fields)


def kind_of(path: Path) -> str:
    """Returns the ending that says how a file is read, without .gz or .zst where it may be compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ending_of(path) and suffixes[-2:-1] and suffixes[-2] in FORMATS and FORMATS[suffixes[-2]].packed:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def describe(kinds: tuple[str, ...]) -> str:
    """Returns endings and what may follow them, for messages."""
    apart = [kind for kind in kinds if not FORMATS[kind].packed]
    but = f", but after {' and '.join(apart)}" if apart else ""
    return f"{', '.join(kinds)} (and {' or '.join(COMPRESSIONS)} after it{but})"
