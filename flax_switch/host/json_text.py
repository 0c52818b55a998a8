"""JSON that others wrote, read in one place: whatever is wrong with it is one `ConfigError` that says where and what."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.host.files import read_bytes

LARGEST_FILE = 1 << 28  # bytes of a settings file or an index; the largest real ones, of a million tensors, have half of it
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES = {dict: "an object", list: "an array", str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Returns the object that a JSON file in UTF-8 holds.

    Raises `ConfigError` for a file that cannot be read, is no regular file, is too large, or holds anything else.
    """
    return json_object(read_bytes(path, LARGEST_FILE, "a file of settings"), os.fspath(path))


def json_object(content: str | bytes, where: str, hint: str = "", what: str = "this") -> dict[str, Any]:
    """Returns the object that a text is as JSON; raises `ConfigError` that begins with `where` if it is none.

    hint: ends messages. what: the text, as their subject.
    """
    value = parse_json(content, where, hint)
    check(isinstance(value, dict), f"{where}: {what} must be a JSON object; it is a {type(value).__name__}.{hint}")
    return value


def parse_json(content: str | bytes, where: str, hint: str = "") -> Any:
    """Returns the value that a text is as JSON, lone halves of surrogate pairs in it replaced by U+FFFD.

    Raises `ConfigError` that begins with `where` for text that is not UTF-8, is malformed, has a key twice in an object, nests more
    deeply than Python can follow, or has integers of thousands of digits.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique)
        return _valid(value) if "\\ud" in text.lower() else value
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8"
        raise ConfigError(f"{where}: not JSON ({byte}).{hint}") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ConfigError(f"{where}{line}: not JSON ({error.msg} at character {error.colno}).{hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: the JSON is nested too deeply.") from error
    except ValueError as error:  # an integer of thousands of digits, or a key that is there twice
        raise ConfigError(f"{where}: {str(error).split(';', maxsplit=1)[0]}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"keys are there twice: {shown(', '.join(twice), str)}")
    return values


def _valid(value: Any) -> Any:
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(name): _valid(item) for name, item in value.items()}
    return valid_text(value) if isinstance(value, str) else value


def valid_text(text: str) -> str:
    """Returns the text with U+FFFD in place of lone halves of surrogate pairs, which no UTF-8 can hold."""
    return _SURROGATE.sub("\ufffd", text) if _SURROGATE.search(text) else text


def field(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str, default: Any = ...) -> Any:
    """Returns a field of foreign JSON, which must be of the kind expected; `default` where it is absent, if one is given.

    Raises `ConfigError` that names file, field, what was expected and what came.
    """
    if name not in values:
        check(default is not ..., f"{where}: there is no field {name!r}.")
        return default
    value, kinds = values[name], kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    expected = " or ".join(_NAMES.get(one, "null") for one in kinds)
    check(fits, f"{where}: field {name!r} must be {expected}; it is {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)
