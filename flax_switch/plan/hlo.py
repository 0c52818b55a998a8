"""Reading HLO text: computations, their instructions, and how often a run of the program executes each.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, for any backend: shapes in it are those of one device. XLA promises
nothing about it, so whatever is not known here is an `UnknownText` that quotes it.
"""

from __future__ import annotations

import dataclasses
import math
import re

from flax_switch.ops.moe.expert_parallel import FURTHER_ROUNDS

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r"([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class UnknownText(ValueError):
    """Text of another program in a form that is not known here; the message quotes it."""

    def __init__(self, what: str, text: str, source: str = "XLA"):
        shown = text if len(text) <= 300 else f"{text[:300]}..."
        super().__init__(
            f"{source} writes {what} in a form that is not known here: {shown!r}. It may be newer than this flax_switch: "
            "take a newer one, or the versions that docs/versions.md lists; please report the text."
        )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `NAME = TYPE OPCODE(OPERANDS), ATTRIBUTES`."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str

    @property
    def operand_names(self) -> list[str]:
        """Names of the operands, whether or not the text repeats their types."""
        return re.findall(r"%([\w.-]+)", self.operands) or re.findall(r"[\w.-]+", self.operands)


Computations = dict[str, list[Instruction]]


def read_computations(text: str) -> tuple[Computations, str]:
    """Returns the instructions of every computation, and the entry's name."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        start = None if line.startswith(" ") else _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            if current is None:
                raise UnknownText("the head of a computation", line.strip())
            current.append(_instruction(*match.groups()))
        elif current is not None and line.strip():
            raise UnknownText("an instruction", line.strip())
    if not entry:
        heads = [line for line in text.splitlines() if line.endswith("{")]
        raise UnknownText("a program's entry", heads[-1] if heads else text)
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    """Splits `TYPE opcode(operands), attributes`, where the type and its layouts may hold parentheses of their own."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = _OPCODE.search(rest, end)
    if match is None:
        raise UnknownText("an instruction", f"{name} = {rest}")
    close = _closing(rest, match.end() - 1)
    return Instruction(name, rest[:end], match.group(1), rest[match.end() : close], rest[close + 1 :])


def _closing(text: str, opening: int) -> int:
    """Returns the place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def shape_bytes(type_text: str) -> int:
    """Returns bytes of a type, of all its parts where it is a tuple."""
    total, shapes = 0, _SHAPE.findall(type_text)
    if not shapes and type_text.strip() != "()":
        raise UnknownText("a type", type_text)
    for dtype, dims in shapes:
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = _BITS.get(dtype, int(bits.group(1)) if bits else None)
        if width is None:
            raise UnknownText("an element type", type_text)
        total += math.prod(_sizes(dims)) * width // 8
    return total


def shape_of(type_text: str) -> tuple[int, ...]:
    """Returns the dimensions of an array's type."""
    match = _SHAPE.search(type_text)
    if match is None:
        raise UnknownText("an array's type", type_text)
    return tuple(_sizes(match.group(2)))


def _sizes(dims: str) -> list[int]:
    return [int(d.lstrip("<=")) for d in dims.split(",") if d]


def executions(computations: Computations, entry: str) -> dict[str, int | None]:
    """Returns how often each computation runs: loops multiply by their trip count, None where it is not known."""
    callers: dict[str, list[tuple[str, int | None]]] = {name: [] for name in computations}
    for caller, instructions in computations.items():
        for instruction in instructions:
            trips = _trip_count(instruction, computations) if instruction.opcode == "while" else 1
            called = [name for _, name in _CALLED.findall(instruction.attributes)]
            for names in _CALLED_LISTS.findall(instruction.attributes):
                called += re.findall(r"[\w.-]+", names)
            for name in called:
                if name in callers:
                    callers[name].append((caller, trips))
    if lost := [name for name, found in callers.items() if not found and name != entry]:
        raise UnknownText("the call of a computation", lost[0])

    counted: dict[str, int | None] = {entry: 1}

    def count(name: str) -> int | None:
        if name not in counted:
            parts = [(count(caller), trips) for caller, trips in callers[name]]
            unknown = any(runs is None or (trips is None and runs) for runs, trips in parts)
            counted[name] = None if unknown else sum((runs or 0) * (trips or 0) for runs, trips in parts)
        return counted[name]

    return {name: count(name) for name in computations}


def _trip_count(loop: Instruction, computations: Computations) -> int | None:
    """Returns what the loop's annotation says or, as TPU programs have none, the bound in its condition `counter < constant`.

    JAX's scans count from 0 by 1, so the bound is the number of trips. Rounds that most steps do not need count 0.
    """
    if re.search(rf'op_name="[^"]*/{FURTHER_ROUNDS}/', loop.attributes):
        return 0
    if known := _TRIP_COUNT.search(loop.attributes):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    instructions = computations.get(condition.group(1), []) if condition else []
    if not instructions or instructions[-1].opcode != "compare" or "direction=LT" not in instructions[-1].attributes:
        return None
    constants = {i.name: i.operands for i in instructions if i.opcode == "constant"}
    bound = constants.get(instructions[-1].operand_names[-1], "")
    return int(bound) if bound.isdigit() else None
