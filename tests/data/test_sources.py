"""Users' own text: every format, and an error that names the place for everything that can be wrong with one."""

import gzip
import json
import sys

import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from flax_switch.config import ConfigError
from flax_switch.data import sources


def read(*names, field="text", separator="line"):
    return list(sources.documents(sources.find_files(tuple(map(str, names))), field, separator))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("One line.\n\nAnother line.\r\n   \n", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("Zipped: größer.\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "From\\nJSON.", "n": 1}\n\n{"text": "More."}\n', encoding="utf-8")
    with gzip.open(tmp_path / "deep" / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "Zipped JSON."}\n')
    (tmp_path / "deep" / "readme.rst").write_text("Not read.")
    return tmp_path


EVERYTHING = ["One line.", "Another line.", "Zipped: größer.", "From\nJSON.", "More.", "Zipped JSON."]


def test_a_folder_is_searched_through_in_order(folder):
    assert read(folder) == EVERYTHING


def test_files_and_globs_are_read_in_the_order_given_and_each_once(folder):
    assert read(folder / "b.txt.gz", folder / "a.txt") == EVERYTHING[2:3] + EVERYTHING[:2]
    assert read(folder / "**" / "*.jsonl*") == EVERYTHING[3:]
    assert read(folder / "a.txt", folder / "*.txt") == EVERYTHING[:2]


def test_documents_may_be_separated_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffA poem\n of two lines\n\n \nAnother\n", encoding="utf-8")
    assert read(tmp_path / "a.txt", separator="blank_line") == ["A poem\nof two lines", "Another"]


def test_reading_is_lazy(folder):
    (folder / "a.txt").write_bytes(b"Fine.\n" * 10 + b"\xff\n")
    documents = sources.documents([folder / "a.txt"])
    assert [next(documents) for _ in range(10)] == ["Fine."] * 10
    with pytest.raises(ConfigError):
        next(documents)


def test_the_fingerprint_changes_with_the_files_and_with_how_they_are_read(folder):
    files = sources.find_files(str(folder))
    before = sources.fingerprint(files, "text", "line")
    assert sources.fingerprint(files, "text", "line") == before
    assert len({before, sources.fingerprint(files, "body", "line"), sources.fingerprint(files[:2], "text", "line")}) == 3
    (folder / "a.txt").write_text("Changed.")
    assert sources.fingerprint(files, "text", "line") != before


def test_a_path_that_names_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder, and no file matches"):
        read(tmp_path / "nothing*.txt")
    with pytest.raises(ConfigError, match="holds no text: none of its files ends in .txt"):
        read(tmp_path)


def test_a_file_of_an_unknown_kind_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"readme.rst is of no kind that can be read; names must end in .txt, .md, .json"):
        read(folder / "deep" / "readme.rst")


def test_bad_utf_8_names_the_file_the_line_and_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("Gut: größer.\nSchlecht: ".encode() + b"gr\xf6\xdfer\n")
    with pytest.raises(ConfigError, match=r"a.txt, line 2: byte 13 of the line \(0xf6\) is not UTF-8.*iconv"):
        read(tmp_path / "a.txt")


def test_malformed_json_names_the_file_and_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2: not JSON \(Expecting value at character"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('["text"]\n')
    with pytest.raises(ConfigError, match=r"line 1: a line must be a JSON object; it is a list"):
        read(tmp_path / "a.jsonl")


def test_a_missing_field_names_the_fields_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "x", "body": "y"}\n')
    with pytest.raises(ConfigError, match=r"line 1: there is no field 'text'; the fields are: title, body\."):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", field="body") == ["y"]
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ConfigError, match="field 'text' must be text; it is a int"):
        read(tmp_path / "a.jsonl")


def test_a_damaged_gzip_file_is_an_error(tmp_path):
    (tmp_path / "a.txt.gz").write_text("not zipped")
    with pytest.raises(ConfigError, match="a.txt.gz is damaged or is no gzip file"):
        read(tmp_path / "a.txt.gz")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"Long text. " * 1000)[:40])
    with pytest.raises(ConfigError, match="a.txt.gz is damaged"):
        read(tmp_path / "a.txt.gz")


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    files = sources.find_files(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match="Cannot read .*a.txt: No such file"):
        list(sources.documents(files))


def test_records_keep_all_fields_and_text_files_have_none(folder):
    records = list(sources.records([folder / "deep" / "c.jsonl"]))
    assert [record for record, _ in records] == [{"text": "From\nJSON.", "n": 1}, {"text": "More."}]
    assert records[1][1].endswith("c.jsonl, line 3")
    with pytest.raises(ConfigError, match="a.txt has no fields"):
        list(sources.records([folder / "a.txt"]))


def test_array_records_hold_json_objects(tmp_path):
    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for content in (b'{"text": "First."}', b'{"text": "Second."}', b"\xff"):
        writer.write(content)
    writer.close()
    documents = sources.documents([path])
    assert [next(documents), next(documents)] == ["First.", "Second."]
    with pytest.raises(ConfigError, match="record 3: records must be JSON objects"):
        next(documents)


def test_parquet_rows_are_documents(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["First.", "Second."], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["First.", "Second."]
    with pytest.raises(ConfigError, match="row 1: there is no field 'body'; the fields are: text, n"):
        read(tmp_path / "a.parquet", field="body")
    (tmp_path / "b.parquet").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="Cannot read .*b.parquet as parquet"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("a.parquet", "pyarrow", "parquet"),
        ("a.arrayrecord", "array_record.python.array_record_module", "arrayrecord"),
    ],
)
def test_a_format_whose_extra_is_missing_says_what_to_install(tmp_path, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"pip install 'flax_switch\[{extra}\]'"):
        read(tmp_path / name)
