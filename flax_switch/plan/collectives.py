"""Reading the collectives of a compiled program from its HLO text: what is sent, among whom, how often.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, for any backend: shapes in it are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re

from flax_switch.plan.hlo import Instruction, executions, read_computations, shape_bytes

KINDS = (
    "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast",
)  # fmt: skip


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
    computations, entry = read_computations(hlo_text)
    runs = executions(computations, entry)
    found = []
    for computation, instructions in computations.items():
        bytes_of = {i.name: shape_bytes(i.type) for i in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, instruction, bytes_of, num_devices, runs.get(computation, 0)))
    return found


def _collective(kind: str, instruction: Instruction, bytes_of: dict[str, int], num_devices: int, count: int | None) -> Collective:
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
