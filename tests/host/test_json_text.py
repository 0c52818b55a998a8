"""Foreign JSON: whatever is wrong with it is one error that says where; what is right is read."""

import json
import os
import re
import time
from pathlib import Path

import pytest

import flax_switch
from flax_switch.config import ConfigError
from flax_switch.host.json_text import field, parse_json, read_json, valid_text

BAD = {
    "cut": ('{"a": [1, ', "not JSON"),
    "two values": ('{"a": 1}\n{"b": 2}', "line 2: not JSON"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "twice: c"),
    "deep": ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a huge integer": ('{"a": ' + "7" * 5000 + "}", "4300 digits"),
    "latin-1": (b'{"a": "caf\xe9"}', "0xe9.* is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "nothing": ("", "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_is_one_error_that_says_where(case, tmp_path):
    content, message = BAD[case]
    with pytest.raises(ConfigError, match=f"(?s)^here.*{message}"):
        parse_json(content, "here")
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"(?s)config.json.*{message}"):
        read_json(path)


def test_many_keys_of_which_one_is_there_twice_are_no_work():
    began = time.monotonic()
    with pytest.raises(ConfigError, match="twice: k0, k1, k10, k100") as refused:
        parse_json("{" + ", ".join(f'"k{i % 100_000}": 0' for i in range(200_000)) + "}", "here")
    assert time.monotonic() - began < 5 and len(str(refused.value)) < 300


def test_a_byte_order_mark_is_no_text_and_half_an_emoji_becomes_a_replacement_character():
    assert parse_json('\ufeff{"a": 1}'.encode(), "here") == {"a": 1}
    assert parse_json(r'{"a\udc00": ["\ud83d x", {"b": "\ud83d\ude00"}]}', "here") == {"a\ufffd": ["\ufffd x", {"b": "😀"}]}
    assert valid_text("a\ud83db") == "a\ufffdb" and valid_text("😀") == "😀"


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # reading it would wait for ever
    with pytest.raises(ConfigError, match="no regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_json(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a JSON object; it is a list"):
        read_json(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [(1, int, True), (True, int, False), (True, bool, True), (1.5, (int, float), True), ("1", int, False), (None, str, False)],
)
def test_a_field_has_the_kind_that_is_expected_or_is_named(value, kind, fits):
    values = json.loads(json.dumps({"size": value}))
    if fits:
        assert field(values, "size", kind, "config.json") == value
    else:
        with pytest.raises(ConfigError, match="config.json: field 'size' must be .*; it is"):
            field(values, "size", kind, "config.json")
    assert field(values, "other", kind, "config.json", 7) == 7
    with pytest.raises(ConfigError, match="no field 'other'"):
        field(values, "other", kind, "config.json")


def test_json_is_read_in_one_module_alone():
    package = Path(flax_switch.__file__).parent
    alone = package / "export" / "load.py"  # is copied beside an exported model, and imports nothing of ours
    modules = [path for path in package.rglob("*.py") if path != alone]
    readers = [path.name for path in modules if re.search(r"\bjson\.loads?\(", path.read_text())]
    assert readers == ["json_text.py"]
