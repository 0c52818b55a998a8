"""Reads which devices take part in a collective, in every form in which XLA writes groups of devices.

    {}                                          all devices, one group
    {{0,1},{2,3}}                               written out; of a permute, pairs (from, to)
    [2,4]<=[4,2]T(1,0)                          0, 1, 2, ... in the shape [4,2], transposed, then cut into 2 rows of 4
    mesh['x'=4,'y'=2] {'y','x':(2)2}            along axes of a mesh, major first; x:(2)2 is the part of size 2 after one of 2
    mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'x'}       of a mesh whose devices are not in order; also as ([2,2]T(1,0))
    maximal_mesh[device_id=5] {}                one device

Anything else is an `UnknownText` that quotes it.
"""

from __future__ import annotations

import math
import re

import numpy as np

from flax_switch.plan.hlo import UnknownText

Groups = tuple[tuple[int, ...], ...]

_ATTRIBUTE = re.compile(r"(?<!\w)(?:replica_groups|source_target_pairs)=")
_LISTS = re.compile(r"\{((?:\{[\d,]*\},?\s*)*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_RANGE = re.compile(rf"\[(\d+),(\d+)\]<={_IOTA}")
_NAME = r"(?:'(?:[^'\\]|\\.)*'|[\w.-]+)"
_MESH = re.compile(rf"mesh\[({_NAME}=\d+(?:,\s*{_NAME}=\d+)*)\](?:, device_ids=\(([^()]*(?:\([\d,]*\))?)\))? ?\{{([^}}]*)\}}")
_MESH_AXIS = re.compile(rf"({_NAME})=(\d+)")
_AXIS = re.compile(rf"({_NAME})(?::\((\d+)\)(\d+))?")
_ONE_DEVICE = re.compile(r"maximal_mesh\[device_id=(\d+)\] ?\{\}")
_END = re.compile(r"\s*(?:,|$)")  # what may follow the groups


def device_groups(attributes: str) -> Groups:
    """Returns the groups of a collective's attributes; () where they say that all devices are one group.

    Raises `UnknownText` for any other text, and where no groups are written at all.
    """
    start = _ATTRIBUTE.search(attributes)
    if start is None:
        raise UnknownText("a collective's groups of devices", attributes.strip(", "))
    text = attributes[start.end() :]
    for form, read in ((_LISTS, _lists), (_RANGE, _range), (_MESH, _mesh), (_ONE_DEVICE, lambda m: ((int(m.group(1)),),))):
        match = form.match(text)
        if match and _END.match(text, match.end()) and (groups := read(match)) is not None:
            return groups
    raise UnknownText("groups of devices", attributes[start.start() :])


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _lists(match: re.Match[str]) -> Groups | None:
    groups = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]*)\}", match.group(1)))
    return groups if all(groups) else None


def _iota(shape: str, order: str | None) -> np.ndarray | None:
    """Returns 0, 1, 2, ... in a shape, transposed; None where the order is not one of the shape's axes."""
    devices = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    axes = _ints(order) if order else list(range(devices.ndim))
    return devices.transpose(axes) if sorted(axes) == list(range(devices.ndim)) else None


def _range(match: re.Match[str]) -> Groups | None:
    rows, columns, devices = int(match.group(1)), int(match.group(2)), _iota(match.group(3), match.group(4))
    return _rows(devices, columns) if devices is not None and devices.size == rows * columns else None


def _rows(devices: np.ndarray, columns: int) -> Groups:
    return tuple(tuple(row) for row in devices.reshape(-1, columns).tolist())


def _mesh(match: re.Match[str]) -> Groups | None:
    """Returns groups along mesh axes: each axis is cut into its parts, and those that are named come last, in their order."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(match.group(1))}
    devices = _mesh_devices(match.group(2), math.prod(sizes.values()))
    parts = _named_parts(match.group(3), sizes)
    if devices is None or parts is None:
        return None
    shape, place = [], {}
    for name, size in sizes.items():
        filled = 1
        for before, width in sorted(part for axis, *part in parts if axis == name):
            if before % filled or size % (before * width):
                return None  # parts that overlap, or do not divide the axis
            place[name, before, width] = len(shape) + 1
            shape += [before // filled, width]
            filled = before * width
        shape.append(size // filled)
    grouped = [place[part] for part in parts]
    alone = [axis for axis in range(len(shape)) if axis not in grouped]
    columns = math.prod(shape[axis] for axis in grouped)
    return _rows(devices.reshape(shape).transpose(*alone, *grouped), columns)


def _mesh_devices(ids: str | None, count: int) -> np.ndarray | None:
    """Returns the mesh's devices in the order of its axes, the first axis major: as listed, or 0, 1, 2, ..."""
    if ids is None:
        return np.arange(count)
    iota = re.fullmatch(_IOTA, ids)
    if iota:
        devices = _iota(iota.group(1), iota.group(2))
    else:
        devices = np.array(_ints(ids)) if re.fullmatch(r"\d+(?:,\s*\d+)*", ids) else None
    return devices.reshape(-1) if devices is not None and devices.size == count else None


def _named_parts(text: str, sizes: dict[str, int]) -> list[tuple[str, int, int]] | None:
    """Returns for every axis of `'x','y':(2)4` the size of the part before it and its own; None where an axis is not the mesh's."""
    parts, end = [], 0
    while end < len(text):
        match = _AXIS.match(text, end)
        if match is None or match.group(1) not in sizes:
            return None
        before, width = (int(match.group(2)), int(match.group(3))) if match.group(2) else (1, sizes[match.group(1)])
        parts.append((match.group(1), before, width))
        end = match.end()
        if end < len(text):
            comma = re.match(r",\s*", text[end:])
            if comma is None:
                return None
            end += comma.end()
    return parts if len(set(parts)) == len(parts) else None
