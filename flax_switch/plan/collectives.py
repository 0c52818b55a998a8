"""Reading the collectives of a compiled program from its HLO text: what is sent, among whom, how often.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, for any backend: shapes in it are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from flax_switch.plan.device_groups import device_groups
from flax_switch.plan.hlo import Instruction, UnknownText, executions, read_computations, shape_bytes

KINDS = (
    "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast",
)  # fmt: skip
# On a TPU: an all-reduce fused with the slice of it that a device keeps; one collective in several fusions, beside their products.
_SCATTERED = "all-reduce-scatter"
_STEP = re.compile(r"\bchannel_id=(\d+)\b.*\bchain_id=")
_NAMES_DEVICES = re.compile(r"(?<!\w)(?:replica_groups|source_target_pairs)=")


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A collective of this kind whose text is not known."""

    kind: str
    reason: UnknownText


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
    """Returns the collectives of a compiled program, in the order of its text.

    hlo_text: of an optimised module. num_devices: what a collective of all devices spans; by default what the module's header
    says. An asynchronous pair counts once, at its start. A ragged all-to-all's bytes are those of its whole operand, though the
    rows sent may be fewer.

    Raises `UnknownText` where the text, the groups of a collective, or an operation that has groups is in no known form.
    """
    found: list[Collective] = []
    for item in readable_collectives(hlo_text, num_devices):
        if isinstance(item, Unreadable):
            raise item.reason
        found.append(item)
    return found


def readable_collectives(hlo_text: str, num_devices: int | None = None) -> Iterator[Collective | Unreadable]:
    """Yields `collectives`, but those that cannot be read come with their kind and the reason, so that the others count."""
    if num_devices is None:
        header = hlo_text.split("\n", 1)[0]
        sizes = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
        num_devices = math.prod(sizes)
    computations, entry = read_computations(hlo_text)
    runs, begun = executions(computations, entry), set()
    for computation, instructions in computations.items():
        types = {i.name: i.type for i in instructions}
        for instruction in instructions:
            if kind := _kind(instruction):
                if part := _STEP.search(instruction.attributes):
                    if part.group(1) in begun:
                        continue
                    begun.add(part.group(1))
                if kind == "all-reduce" and computation.startswith(_SCATTERED):
                    kind = "reduce-scatter"
                try:
                    yield _collective(kind, instruction, types, num_devices, runs[computation])
                except UnknownText as reason:
                    yield Unreadable(kind, reason)


def _kind(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, None for what sends nothing; whatever names devices is a collective, known or not."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return kind
    sends = instruction.opcode == "send" and "is_host_transfer=true" not in instruction.attributes
    return instruction.opcode if sends or _NAMES_DEVICES.search(instruction.attributes) else None


def _collective(kind: str, instruction: Instruction, types: dict[str, str], num_devices: int, count: int | None) -> Collective:
    if kind not in KINDS:
        raise UnknownText("an operation among devices", f"{instruction.opcode}({instruction.operands}){instruction.attributes}")
    groups = device_groups(instruction.attributes)
    group_size = max(map(len, groups)) if groups and kind != "collective-permute" else num_devices
    operands = instruction.operand_names
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the others are the result's buffer, offsets and sizes
    if not operands or any(name not in types for name in operands):
        raise UnknownText(f"what an {kind} sends", f"{instruction.opcode}({instruction.operands})")
    size = sum(shape_bytes(types[name]) for name in operands)
    if kind == "all-gather":
        size *= group_size
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, instruction.name, size, groups, group_size, count, op_name.group(1) if op_name else "")
