"""How all values on command lines are parsed: `--config.train.steps=500`, `--set d_ff=64`, `--num-beams 4`."""

from __future__ import annotations

import ast
from typing import Any

from flax_switch.config.base import _tuples, check


def parse_value(text: str) -> Any:
    """Reads a Python literal, or true, false, none or null in any case; else the value is the text itself. Lists become tuples."""
    named = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        value = _tuples(ast.literal_eval(text))
        repr(value)  # raises for an integer of thousands of digits, which no message could show
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
        return text


def parse_assignment(text: str, form: str) -> tuple[str, Any]:
    """Reads 'name=value' as (name, value). Without an '=' raises `ConfigError`, which begins with `form`: what was expected."""
    name, equals, value = text.partition("=")
    check(equals, f"{form}; {text!r} has no '='.")
    return name, parse_value(value)
