"""A plan as text."""

from __future__ import annotations

from flax_switch.plan.planner import Plan
from flax_switch.plan.program import Program
from flax_switch.plan.topology import GIB


def render(plan: Plan, title: str = "run") -> str:
    """Returns the plan in lines of at most 132 characters."""
    chip, machine = plan.topology.chip, plan.topology
    mesh = ", ".join(f"{axis} {ways}" for axis, ways in plan.mesh.items()) + (", fsdp" if plan.fsdp else "")
    of = "" if chip.memory is None else f" of {chip.memory / GIB:.1f} GiB"
    lines = [
        f"{title} on {machine.name}: {machine.num_devices} {chip.name}{of}; mesh {mesh}",
        f"  parameters      {plan.parameters:,} in total, {plan.active_parameters:,} active per token",
        f"  batch           {plan.tokens:,} tokens, sources and targets",
        f"  model FLOPs     {plan.model_flops:.4g} a train step (products of the model alone, forward and backward)",
        *_memory_lines(plan),
        *_slots_lines(plan),
        *(f"  mind            {warning}" for warning in plan.warnings),
    ]
    for program in (plan.train, plan.decode):
        if program is not None:
            lines += _program_lines(plan, program)
    if plan.not_compiled:
        lines.append(f"  not compiled    {plan.not_compiled[0].upper()}{plan.not_compiled[1:]} What is above needs no compiler.")
    return "\n".join(lines + _verdict(plan))


def _memory_lines(plan: Plan) -> list[str]:
    memory, limit = plan.memory, plan.topology.chip.memory
    rows = {
        "parameters": memory.parameters,
        "optimiser state": memory.optimizer,
        "batch": memory.batch,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "further rounds": memory.rounds,
        "total": memory.total,
    }
    if not memory.rounds:
        del rows["further rounds"]
    notes = {
        "gradients": "all held at once",
        "activations": "kept for the backward pass; an estimate before XLA's fusions",
        "further rounds": "of dropless layers, where a device has no room for its rows; an estimate",
    }
    lines = ["  memory of a device, from shapes and shardings"]
    for name, size in rows.items():
        share = f"{size / limit:7.1%}" if limit else ""
        lines.append(f"    {name:<16}{size / GIB:10.3f} GiB {share}  {notes.get(name, '')}".rstrip())
    return lines


def _slots_lines(plan: Plan) -> list[str]:
    if not plan.slots_per_token:
        return []
    slots = ", ".join(f"{stack} {slots:.3f}" for stack, slots in plan.slots_per_token.items())
    return [f"  expert slots    {slots} per token (the capacity factor after rounding)"]


def _program_lines(plan: Plan, program: Program) -> list[str]:
    if program.refusal or program.required is None:
        refused = f"  {program.name}: the compiler refused it after {program.compile_seconds:.0f} s: {program.refusal}"
        return [refused, *(f"    NOT KNOWN     {reason}" for reason in program.unknown)]
    limit = plan.topology.chip.memory
    share = f", {program.required / limit:.1%} of a device" if limit else ""
    lines = [
        f"  {program.name}, compiled in {program.compile_seconds:.0f} s ({program.cpu_seconds:.0f} s of CPU); of one device:",
        f"    memory        {program.required / GIB:.3f} GiB at the peak{share}",
        f"                  (arguments {program.arguments / GIB:.3f}, temporaries {program.temporaries / GIB:.3f}, program "
        f"{program.code / GIB:.3f} GiB; not all at once)",
        _flops_line(program),
    ]
    training = program is plan.train
    if training and plan.useful_share is not None:
        lines.append(f"    useful        {plan.useful_share:.1%} of them: the model's own FLOPs over the compiled ones")
        if plan.topology.chip.peak_flops and program.flops is not None:
            seconds = program.flops / plan.topology.chip.peak_flops
            lines.append(
                f"    at full speed {seconds:.3g} s a step at the chip's peak, {plan.topology.chip.peak_flops / 1e12:.0f} TFLOP/s"
            )
    return lines + _traffic_lines(plan, program) + [f"    NOT KNOWN     {reason}" for reason in program.unknown]


def _flops_line(program: Program) -> str:
    if program.flops is None:
        return "    FLOPs         not known, see below"
    loops = "" if program.flops_complete else " (one of unknown length counts once)"
    return f"    FLOPs         {program.flops:.4g} in matrix products, loops multiplied by their trip counts{loops}"


def _traffic_lines(plan: Plan, program: Program) -> list[str]:
    if any(reason.startswith("collectives:") for reason in program.unknown):
        return ["    collectives   not known, see below"]
    lines = ["    collectives   instructions  executions  GB of arrays    GB sent"]
    for t in program.traffic:
        if t.wire_bytes is None or t.bytes is None:
            lines.append(f"      {t.kind:<20}not known, see below")
            continue
        lines.append(
            f"      {t.kind:<20}{t.instructions:>4}  {t.executions:>10}  {t.bytes / 1e9:>12.4f}  {t.wire_bytes / 1e9:>9.4f}"
            + ("" if t.complete else "  (a loop of unknown length counts once)")
        )
    if not program.traffic:
        lines.append("      none")
    if program is plan.train:
        lines += [f"      {line}" for line in _bound_lines(plan, program)]
    return lines


def _bound_lines(plan: Plan, program: Program) -> list[str]:
    """Returns what must be sent beside what is: for the experts by all-to-alls, for parameters and the model axis by all others."""
    lines, exchanges = [], ("all-to-all", "ragged-all-to-all")
    others = {kind: bound for kind, bound in plan.parameter_bound.items() if bound}
    kinds = ", ".join(f"{kind} {bound / 1e9:.4f}" for kind, bound in others.items())
    needs = f"parameters and gradients need at least {kinds} GB" if others else ""
    if plan.activation_bound:
        needs += f"{' and ' if others else ''}activations over model {plan.activation_bound / 1e9:.4f} GB"
    for what, bound, senders, by in (
        (f"the experts' exchange needs at least {plan.exchange_bound / 1e9:.4f} GB", plan.exchange_bound, True, "all-to-alls send"),
        (needs, sum(others.values()) + plan.activation_bound, False, "the other kinds send"),
    ):
        parts = [t.wire_bytes for t in program.traffic if (t.kind in exchanges) == senders]
        sent = [part for part in parts if part is not None]
        if bound:
            share = f"{sum(sent) / 1e9:.4f} GB ({sum(sent) / bound:.3f} of it)"
            lines.append(f"{what}; {by} {share if len(sent) == len(parts) else 'an unknown amount'}")
    return lines


def _verdict(plan: Plan) -> list[str]:
    if plan.fits is None:
        return ["  whether it fits is not known: the memory is the host's"]
    how = "as compiled" if plan.train is not None else "by shapes and shardings"
    if plan.fits:
        return [f"  fits, {how}"]
    return [f"  DOES NOT FIT, {how}", *(f"    {line}" for line in plan.advice)]
