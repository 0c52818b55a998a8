"""Texts: corpora in every format, tasks, saved data sets, token caches, vocabularies, lines to generate from."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.data import cache, sources
from flax_switch.data.tasks import prepare_tasks
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.generation.text import read_lines
from tests.fuzz.case import Reader
from tests.fuzz.readers.models import vocabulary

TEXTS = [f"The quick brown fox {i}, “jumps” over the lazy dog." for i in range(20)]
ROWS = [{"text": text, "inputs": text, "targets": ["a", "b"] if i % 2 else "c", "label": i % 2} for i, text in enumerate(TEXTS)]


def _jsonl() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def _table(separator: str) -> str:
    quote = '"' if separator == "," else ""
    rows = [separator.join((f"{quote}{text}{quote}", f"{quote}{text}{quote}", "c")) for text in TEXTS]
    return "\n".join([separator.join(("text", "inputs", "targets")), *rows])


def _parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "inputs": TEXTS, "targets": TEXTS}), path)


def _zstd(text: str) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd.compress(text.encode())


def _array_records(path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()


def _text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode()) and None


CORPORA: dict[str, Callable[[Path], Any]] = {
    "a.txt": _text("\n".join(TEXTS)),
    "a.md": _text("\n\n".join(TEXTS)),
    "a.json": _text(json.dumps(ROWS)),
    "a.jsonl": _text(_jsonl()),
    "a.csv": _text(_table(",")),
    "a.tsv": _text(_table("\t")),
    "a.parquet": _parquet,
    "a.array_record": _array_records,
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress("\n".join(TEXTS).encode())),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_jsonl().encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(_zstd(_jsonl())),
}


def _corpus(name: str) -> Reader:
    def read(folder: Path, rng: random.Random) -> None:
        separator = rng.choice(("line", "blank_line"))
        source = rng.choice((str(folder), str(folder / name), str(folder / "*")))
        paths = sources.find_files(source)
        sources.fingerprint(paths, "text", separator)
        for document in sources.documents(paths, "text", separator):
            document.encode()

    return Reader(lambda folder: CORPORA[name](folder / name), read)


def _task(name: str) -> Reader:
    def read(folder: Path, rng: random.Random) -> None:
        source = str(folder / name) if name else str(folder)
        inputs, targets = rng.choice(
            (("inputs", "targets"), ("inputs", "label"), ("Q: {inputs}", "targets"), ("a.b", "targets"), (0, 1))
        )
        config = FinetuneDataConfig(
            train=source, inputs=inputs, targets=targets, skip_empty=rng.random() < 0.5, inputs_length=16, targets_length=8
        )
        prepare_tasks(config, vocabulary())

    return Reader(lambda folder: CORPORA[name](folder / name), read)


def _parallel(folder: Path) -> None:
    for ending in ("en", "de"):
        (folder / f"train.{ending}").write_text("\n".join(TEXTS))


def _read_parallel(folder: Path, rng: random.Random) -> None:
    task = TaskConfig(train=str(folder / "train"), inputs="en", targets="de")
    prepare_tasks(FinetuneDataConfig(tasks=(task,), inputs_length=16, targets_length=8), vocabulary())


def _dataset(folder: Path) -> None:
    """What `datasets` saves."""
    import pyarrow

    table = pyarrow.table({"inputs": TEXTS, "targets": TEXTS})
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def _read_dataset(folder: Path, rng: random.Random) -> None:
    prepare_tasks(FinetuneDataConfig(train=str(folder), inputs_length=16, targets_length=8), vocabulary())


def _tokens(folder: Path) -> Any:
    return cache.tokenize(TEXTS, vocabulary(), folder, corpus_fingerprint="x", heldout_fraction=0.2, quiet=True)


def _read_tokens(folder: Path, rng: random.Random) -> None:
    for store in _tokens(folder).values():
        for i in range(store.num_documents):
            assert store.document(i).size


def _lines(folder: Path) -> None:
    (folder / "in.jsonl").write_text(_jsonl())


def _read_lines(folder: Path, rng: random.Random) -> None:
    if not (folder / "in.jsonl").is_file():  # --input may be a pipe, and waits for who writes into it
        return
    with open(folder / "in.jsonl", "rb") as file:
        for line in read_lines(file):
            assert line.error or vocabulary().encode(line.text[:10_000]) is not None  # more takes longer, as it should


READERS = {
    **{f"corpus-{name}": _corpus(name) for name in CORPORA},
    **{f"task-{name}": _task(name) for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet")},
    "parallel-text": Reader(_parallel, _read_parallel),
    "saved-dataset": Reader(_dataset, _read_dataset),
    "token-cache": Reader(_tokens, _read_tokens),
    "vocabulary": Reader(lambda folder: vocabulary().save(folder), lambda folder, rng: Vocabulary.load(folder).encode("a b")),
    "lines": Reader(_lines, _read_lines, ("in.jsonl",)),
}
