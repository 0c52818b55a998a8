"""Every format of text, plain and compressed, says the same; and what is wrong with a file is said by file and place."""

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from flax_switch.config import ConfigError, DataConfig
from flax_switch.config.finetuning import FinetuneDataConfig
from flax_switch.data import formats, packed, prepare, sources
from flax_switch.data.tasks import read_task

TEXTS = ["Größer als eins.", 'With, commas and "quotes".', "And a third one."]
RECORDS = [{"text": text, "url": f"https://example.org/{i}"} for i, text in enumerate(TEXTS)]


def zstd():
    return packed._zstd(Path("a test"))


def table(separator, quote):
    rows = [list(RECORDS[0]), *(list(record.values()) for record in RECORDS)]
    return "".join(separator.join(map(quote, row)) + "\n" for row in rows).encode()


def parquet_file(columns):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FILES = {
    "a.txt": "\n".join(TEXTS).encode(),
    "c4-train.00000-of-01024.json": JSON_LINES,
    "array.json": json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    "a.jsonl": JSON_LINES,
    "a.ndjson": JSON_LINES,
    "a.csv": table(",", quoted),
    "a.tsv": table("\t", str),
    "a.parquet": parquet_file({"text": TEXTS, "url": ["", "", ""]}),
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: zstd().compress(content)}


def read(*paths, field="text", separator="line"):
    return list(sources.documents(sources.find_files(tuple(map(str, paths))), field, separator))


def write(folder, name, content, ending=""):
    path = folder / (name + ending)
    path.write_bytes(PACK[ending](content))
    return path


def test_the_table_has_a_test_for_every_format():
    kinds = {Path(name).suffix for name in FILES} | {".md"}
    assert kinds == {kind for kind, form in formats.FORMATS.items() if form.packed}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents_plain_and_compressed(tmp_path, name, ending):
    path = write(tmp_path, name, FILES[name], ending)
    assert read(path) == TEXTS
    assert read(str(tmp_path / "*.*")) == TEXTS
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", [name for name in FILES if Path(name).suffix in formats.WITH_FIELDS])
def test_tasks_read_every_format_with_fields_plain_and_compressed(tmp_path, name, ending):
    data = FinetuneDataConfig(
        train=str(write(tmp_path, name, FILES[name], ending)), inputs="text", targets="text", validation_fraction=0.0
    )
    found, _ = read_task(data.mixture[0], data)
    assert [example.inputs for example in found] == TEXTS


@pytest.mark.parametrize("ending", PACK)
def test_parallel_text_may_be_compressed_either_way(tmp_path, ending):
    write(tmp_path, "a.en", b"one\ntwo\n", ending)
    write(tmp_path, "a.de", b"eins\nzwei\n")
    data = FinetuneDataConfig(train=str(tmp_path / "a"), inputs="en", targets="de", validation_fraction=0.0)
    found, _ = read_task(data.mixture[0], data)
    assert [(example.inputs, *example.references) for example in found] == [("one", "eins"), ("two", "zwei")]


@pytest.mark.parametrize("ending", PACK)
def test_a_markdown_file_is_one_document(tmp_path, ending):
    write(tmp_path, "a.md", "\ufeff# Title\r\n\r\nA paragraph\nof two lines.\n\n".encode(), ending)
    write(tmp_path, "b.md", b"\n \n", ending)
    assert read(tmp_path) == ["# Title\n\nA paragraph\nof two lines."]
    assert read(tmp_path, separator="blank_line") == read(tmp_path)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".parquet")])
def test_byte_order_marks_and_windows_line_ends_are_no_text(tmp_path, name):
    content = b"\xef\xbb\xbf" + FILES[name].replace(b"\n", b"\r\n")
    assert read(write(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl"])
def test_a_document_may_be_longer_than_tables_fields_are_by_default(tmp_path, name):
    long = "word " * 100_000
    content = {".csv": f"n,text\n1,{long}\n", ".tsv": f"n\ttext\n1\t{long}\n"}.get(Path(name).suffix, json.dumps({"text": long}))
    assert read(write(tmp_path, name, content.encode())) == [long]


def test_a_quoted_field_of_a_csv_file_may_hold_line_ends(tmp_path):
    path = write(tmp_path, "a.csv", b'text,n\r\n"One\r\n\r\nline",1\r\nOther,2\r\n')
    assert read(path) == ["One\n\nline", "Other"]
    with pytest.raises(ConfigError, match="a.csv, line 2: there is no field 'body'; the fields are: text, n"):
        read(path, field="body")


def test_another_column_is_named_by_the_setting(tmp_path):
    assert read(write(tmp_path, "a.csv", FILES["a.csv"]), field="url") == [record["url"] for record in RECORDS]


@pytest.mark.parametrize("name", [name for name in FILES if name != "a.txt"])
def test_a_wrong_column_names_those_there_are_and_the_place(tmp_path, name):
    path = write(tmp_path, name, FILES[name])
    place = {".csv": "line 2", ".tsv": "line 2", ".parquet": "row 1"}.get(path.suffix, "line 1")
    place = "item 1" if name == "array.json" else place
    with pytest.raises(ConfigError, match=rf"{name}, {place}: there is no field 'body'; the fields are: text, url\."):
        read(path, field="body")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_compressed_file_is_an_error_that_names_it(tmp_path, name, ending):
    whole = write(tmp_path, name, FILES[name] * 50, ending)
    what = {".gz": "gzip", ".zst": "Zstandard"}[ending]
    for damaged in (whole.read_bytes()[:-6], b"no archive at all", whole.read_bytes()[:30] + b"\0" * 30):
        whole.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{name}{ending} is damaged or is no {what} file"):
            read(whole)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", [*(name for name in FILES if name != "a.parquet"), "a.md"])
def test_an_empty_file_has_no_documents_and_nothing_but_such_is_an_error(tmp_path, name, ending):
    path = write(tmp_path, name, b"", ending)
    with pytest.raises(ConfigError, match=rf"There is no text in .*{name}{ending}: a document needs"):
        read(path)
    assert read(path, write(tmp_path, "z.txt", b"Text.")) == ["Text."]


def test_an_empty_array_and_a_table_of_names_alone_have_no_documents(tmp_path):
    write(tmp_path, "a.json", b" \n[\n]\n")
    write(tmp_path, "a.csv", b"text,url\n")
    write(tmp_path, "a.parquet", parquet_file({"text": pyarrow.array([], pyarrow.string())}))
    with pytest.raises(ConfigError, match=r"no text in .*a.csv and 2 other files"):
        prepare(DataConfig(source=str(tmp_path), cache_dir=str(tmp_path / "cache")), quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'{\n "text": "x"\n}\n',
            r"a.json, line 1: not JSON .*A .json file is one array of objects, or has",
        ),
        ("a.json", b'["x"]', r"a.json, item 1: an item must be a JSON object; it is a str"),
        ("a.json", b'[{"text": "x"},\n {"text": }]', r"a.json, line 2: not JSON \(Expecting value at character 11\)"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', r"a.json, line 2: not JSON \(Extra data"),
        ("a.json", b'[{"text": 3}]', r"a.json, item 1: field 'text' must be text; it is a int"),
        ("a.json", b'[{"text": "\xff"}]', r"a.json, line 1: byte 12 of the line \(0xff\) is not UTF-8"),
        ("a.csv", b"text,n\nx,1\ny,2,3\n", r"a.csv, line 3: the row has 3 columns, but the first one has 2"),
        ("a.csv", b'text,n\n"never closed,1\n', r"a.csv, line 2: this is no row of a .csv file \(unexpected end of data\)"),
        ("a.csv", b"text,n,,,text\nx,1,,,y\n", r"a.csv, line 1: the first row names columns twice: text. Give each its own name"),
        ("a.tsv", b"text\tn\nx\n", r"a.tsv, line 2: the row has 1 columns, but the first one has 2"),
        ("a.parquet", b"", r"Cannot read .*a.parquet.* as parquet"),
    ],
)
@pytest.mark.parametrize("ending", PACK)
def test_mistakes_name_the_file_and_the_place(tmp_path, name, content, message, ending):
    with pytest.raises(ConfigError, match=message.replace(f"{name}, ", f"{name}{ending}, ")):
        read(write(tmp_path, name, content, ending))


def test_without_its_extra_zstandard_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, "a.json", JSON_LINES, ".zst")
    for module in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"a.json.zst needs backports.zstd: pip install 'flax_switch\[zstd\]'"):
        read(path)


def test_python_s_own_zstandard_is_used_where_there_is_one(tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt", FILES["a.txt"], ".zst")
    own = type(sys)("compression")
    own.zstd = zstd()
    monkeypatch.setitem(sys.modules, "compression", own)
    monkeypatch.setitem(sys.modules, "backports", None)
    assert read(path) == TEXTS


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_a_big_file_is_read_a_little_at_a_time(tmp_path, name, ending):
    """20 MB of text; JSON arrays and markdown, which are read whole, say so in docs/data.md."""
    text, count = "one two three four " * 50, 20_000
    rows = {".txt": text, ".json": json.dumps({"text": text}), ".csv": text, ".tsv": text}.get(Path(name).suffix, "")
    head = "text\n" if name in ("a.csv", "a.tsv") else ""
    content = parquet_file({"text": [text] * count}) if name == "a.parquet" else (head + f"{rows}\n" * count).encode()
    path = write(tmp_path, name, content, ending)
    del content
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.documents([path])) == count
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()
