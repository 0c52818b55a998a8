"""Reading the collectives of a compiled program from its HLO text: what is sent, among whom, how often.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, for any backend: shapes in it are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = (
    "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast",
)  # fmt: skip

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r"([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program, as each device executes it."""

    kind: str  # one of KINDS
    name: str  # the instruction's
    bytes: int  # of the whole array a device ends or begins with, whichever is larger: of an all-to-all, its own part included
    groups: tuple[tuple[int, ...], ...]  # the devices that talk to each other; pairs (from, to) of a permute; () if all
    group_size: int  # devices in a group
    count: int | None  # how often a run of the program executes it; None inside a loop whose length is not known
    op_name: str = ""  # where it comes from in the traced program, as JAX names it

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device must send at the least, each time: those that stay on it are not counted."""
        if self.kind.startswith("collective"):
            return float(self.bytes)
        share = self.bytes * (1 - 1 / self.group_size)
        return 2 * share if self.kind == "all-reduce" else share


def collectives(hlo_text: str, num_devices: int | None = None) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    hlo_text: of an optimised module. num_devices: what a collective without groups spans; by default what the module's header
    says. An asynchronous pair counts once, at its start. A ragged all-to-all's bytes are those of its whole operand, though the
    rows sent may be fewer.
    """
    if num_devices is None:
        header = hlo_text.split("\n", 1)[0]
        sizes = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
        num_devices = math.prod(sizes)
    computations, entry = _computations(hlo_text)
    executions = _executions(computations, entry)
    found = []
    for computation, instructions in computations.items():
        bytes_of = {i.name: _shape_bytes(i.type) for i in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, instruction, bytes_of, num_devices, executions.get(computation, 0)))
    return found


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: str
    attributes: str


def _collective(kind: str, instruction: _Instruction, bytes_of: dict[str, int], num_devices: int, count: int | None) -> Collective:
    groups = _groups(instruction.attributes)
    group_size = len(groups[0]) if groups and kind != "collective-permute" else num_devices
    operands = re.findall(r"%([\w.-]+)", instruction.operands) or re.findall(r"[\w.-]+", instruction.operands)
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the others are the result's buffer, offsets and sizes
    size = sum(bytes_of.get(name, 0) for name in operands)
    if kind == "all-gather":
        size *= group_size
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, instruction.name, size, groups, group_size, count, op_name.group(1) if op_name else "")


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation, and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = None if line.startswith(" ") else _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(*match.groups()))
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    """Splits `TYPE opcode(operands), attributes`, where the type and its layouts may hold parentheses of their own."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = _OPCODE.search(rest, end)
    if match is None:
        return _Instruction(name, rest, "", "", "")
    close = _closing(rest, match.end() - 1)
    return _Instruction(name, rest[:end], match.group(1), rest[match.end() : close], rest[close + 1 :])


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _shape_bytes(type_text: str) -> int:
    total = 0
    for dtype, dims in _SHAPE.findall(type_text):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = _BITS[dtype] if dtype in _BITS else int(bits.group(1)) if bits else 0
        total += math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d) * width // 8
    return total


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Groups written out, `{{0,1},{2,3}}`, or as a transposed range, `[2,4]<=[4,2]T(1,0)`."""
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?\s*)*)\}", attributes)
    if match:
        return tuple(tuple(int(i) for i in g.split(",") if i) for g in re.findall(r"\{([\d,]*)\}", match.group(1)))
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if not match:
        return ()
    rows, columns = int(match.group(1)), int(match.group(2))
    shape = [int(d) for d in match.group(3).split(",")]
    order = [int(a) for a in match.group(4).split(",")] if match.group(4) else list(range(len(shape)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    devices = [0]
    for axis in order:
        devices = [device + i * strides[axis] for device in devices for i in range(shape[axis])]
    return tuple(tuple(devices[r * columns : (r + 1) * columns]) for r in range(rows))


def _executions(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int | None]:
    """How often each computation runs: loops multiply by their trip count, None where it is not known."""
    callers: dict[str, list[tuple[str, int | None]]] = {name: [] for name in computations}
    for caller, instructions in computations.items():
        for instruction in instructions:
            trips = None
            if instruction.opcode != "while":
                trips = 1
            elif known := _TRIP_COUNT.search(instruction.attributes):
                trips = int(known.group(1))
            called = [name for _, name in _CALLED.findall(instruction.attributes)]
            for names in _CALLED_LISTS.findall(instruction.attributes):
                called += re.findall(r"[\w.-]+", names)
            for name in called:
                if name in callers:
                    callers[name].append((caller, trips))

    counted: dict[str, int | None] = {entry: 1}

    def count(name: str) -> int | None:
        if name not in counted:
            parts = [(count(caller), trips) for caller, trips in callers[name]]
            unknown = any(runs is None or (trips is None and runs) for runs, trips in parts)
            counted[name] = None if unknown else sum(runs * (trips or 0) for runs, trips in parts)
        return counted[name]

    return {name: count(name) for name in computations}
