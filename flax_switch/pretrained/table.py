"""A model at a glance: its config as a line, and a table of its parameters by part, as text and for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_switch.config.weights import SCALE
from flax_switch.convert.canonical import KINDS, flatten, kind_of, parameters_of

if TYPE_CHECKING:
    from flax_switch.pretrained.model import Pretrained

STACKS = ("", "encoder", "decoder")  # in no stack: what both share
HEADER = ("part", "parameters", "size", "dtype")


def rows(params: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns a row (part, parameters, size, dtype) for each kind of parameter in each stack, and one for their sum.

    Leaves are anything with a shape and a dtype; no value is read.
    """
    counts: dict[str, list[int]] = {}
    dtypes: dict[str, set[str]] = {}
    kinds = [kind for kind, _ in KINDS]
    flat = sorted(flatten(dict(params)).items(), key=lambda leaf: (STACKS.index(_stack(leaf[0])), kinds.index(kind_of(leaf[0]))))
    for path, leaf in flat:
        size, dtype = math.prod(leaf.shape), np.dtype(leaf.dtype)
        for part in (f"{_stack(path)} {kind_of(path)}".strip(), "all"):
            count = counts.setdefault(part, [0, 0])
            count[:] = count[0] + parameters_of(path, leaf.shape, dtype), count[1] + size * dtype.itemsize
            dtypes.setdefault(part, set()).add(dtype.name)
    parts = [*(part for part in counts if part != "all"), "all"]
    return [(part, f"{counts[part][0]:,}", in_bytes(counts[part][1]), ", ".join(sorted(dtypes[part]))) for part in parts]


def as_text(pretrained: Pretrained) -> str:
    """Returns a model as lines that one can read: what it is, its config, its vocabulary, its parameters."""
    table = [HEADER, *rows(pretrained.params)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in table]
    return "\n".join([*(f"{name:<12}{value}" for name, value in _facts(pretrained)), *lines])


def as_html(pretrained: Pretrained) -> str:
    """Returns the same for a notebook."""
    facts = "".join(f"<div><b>{name}</b> <code>{html.escape(value)}</code></div>" for name, value in _facts(pretrained))
    cells = [(HEADER, "th"), *((row, "td") for row in rows(pretrained.params))]
    body = "".join("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>" for row, tag in cells)
    return f"{facts}<table>{body}</table>"


def in_bytes(size: int) -> str:
    """Returns a number of bytes in a unit that suits it: '640 B', '1.5 MiB', '27.4 GiB'."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _facts(pretrained: Pretrained) -> list[tuple[str, str]]:
    name = type(pretrained.model).__name__ + ("" if pretrained.architecture == "full" else f", {pretrained.architecture}")
    vocabulary = "none" if pretrained.vocabulary is None else str(pretrained.vocabulary)
    facts = [("model", name), ("config", repr(pretrained.config)), ("vocabulary", vocabulary), *_kernels(pretrained)]
    if pretrained.adapters:
        facts += [("adapter", f"{pretrained.adapter or 'none'}, of {', '.join(pretrained.adapters)}")]
    return [*facts, ("prefix", " or ".join(map(repr, pretrained.prefixes)))] if pretrained.prefixes else facts


def _kernels(pretrained: Pretrained) -> list[tuple[str, str]]:
    """Returns how many quantised kernels are held as what, where there are some."""
    flat = flatten(dict(pretrained.params))
    held = [np.dtype(flat[path.removesuffix(SCALE)].dtype) for path in flat if path.endswith(SCALE)]
    floats = sum(dtype == np.float32 for dtype in held)
    return [("kernels", f"{len(held) - floats} held as integers, {floats} as float32")] if held else []


def _stack(path: str) -> str:
    stack = path.partition("/")[0]
    return stack if stack in STACKS else ""
