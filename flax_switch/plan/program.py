"""Compiling the train step and the decode step for devices that need not exist, and reading what the compiler says of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from flax_switch.config import ExperimentConfig
from flax_switch.generation.program import decode, decoder_config, in_compute_dtype, start_cache
from flax_switch.host.jax_settings import jax_setting
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.parallel.mesh import batch_sharding, batch_ways
from flax_switch.parallel.placement import LaidOutByCompiler
from flax_switch.plan.collectives import Collective, Unreadable, readable_collectives
from flax_switch.plan.flops import program_flops
from flax_switch.plan.hlo import UnknownText
from flax_switch.training.saved_program import compile_anew, lower_step, save_program
from flax_switch.training.state import build_run

EFFORTS = ("quick", "full")
DECODE_ROWS = 8  # sequences for each part of a batch, in the decode step

_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_OUT_OF_MEMORY = (
    re.compile(rf"Used {_SIZE} of {_SIZE}"),
    re.compile(rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one run of a program. Bytes are one device's."""

    kind: str
    instructions: int
    executions: int  # loops multiplied by their trip counts
    bytes: int | None  # of the arrays; None where XLA's text of one of them is not known
    wire_bytes: int | None  # that a device must send at the least; None where that is not known
    complete: bool  # False where a loop of unknown length counts once


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, on each device. Where the compiler ran out of memory, only `required` and `refusal` are known."""

    name: str
    compile_seconds: float
    cpu_seconds: float  # of all of the compiler's threads, which is what other work on the machine does not stretch
    required: int | None  # bytes: arguments, outputs not updated in place, temporaries, code at the peak; None where not said
    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float | None = 0.0  # of matrix products, loops multiplied by their trip counts; None where XLA's text is not known
    flops_complete: bool = True
    xla_flops: float = 0.0  # XLA's own count, every loop's body once
    traffic: tuple[Traffic, ...] = ()
    refusal: str | None = None  # what the compiler said instead of compiling
    unknown: tuple[str, ...] = ()  # figures that are not known, each with the text of XLA that was not understood


@contextlib.contextmanager
def compiler_effort(effort: str) -> Iterator[None]:
    """Sets how long XLA searches for faster code: "full" as in training; "quick" takes 0.6 of the time and a little more memory."""
    before = jax_setting("jax_optimization_level")
    if effort == "quick":
        jax.config.update("jax_optimization_level", "O1")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def compile_train(config: ExperimentConfig, mesh: Mesh, folder: epath.PathLike | None = None) -> Program:
    """Returns the train step that training runs, compiled for the mesh's devices; in a folder, if one is given, it is kept."""
    run = build_run(config, mesh)
    keep = None if folder is None else functools.partial(save_program, folder, run)
    return _compiled("train step", mesh, lambda: lower_step(run), keep)


def compile_decode(config: ExperimentConfig, mesh: Mesh) -> Program:
    """Compiles one step of generation: a new token for `DECODE_ROWS` sequences of each part of the batch, over a full cache.

    Generation casts the parameters and projects the source once, and lets the compiler place what comes of it; the step starts
    from there.
    """
    model = config.model.replace(scan_layers=False)
    run = build_run(config.replace(model=model), mesh)
    decoder = SwitchTransformer(decoder_config(model, "auto"), devices=LaidOutByCompiler())
    rows, lengths = DECODE_ROWS * batch_ways(mesh), config.data.stack_lengths(model)
    split, length = batch_sharding(mesh), lengths["decoder"]
    seen = lengths.get("encoder", length)  # places that the mask is of

    def start(params, encoded):
        variables = in_compute_dtype({"params": params}, decoder.config)
        return variables, start_cache(decoder, variables, rows if model.decoder_only else encoded, length)

    def step(variables, tokens, mask, cache):
        return decode(decoder, variables, tokens, mask, cache)

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

    inputs = (run.abstract_state.params, struct((seen, model.d_model), jnp.dtype(model.dtype)))

    def lower():
        started = jax.jit(start).lower(*inputs).compile()
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        variables, cache = jax.tree.map(place, jax.eval_shape(start, *inputs), started.output_shardings)
        return jax.jit(step, donate_argnums=3).lower(variables, struct((1,), jnp.int32), struct((seen,), bool), cache)

    return _compiled("decode step", mesh, lower)


def _compiled(name: str, mesh: Mesh, lower: Callable[[], Any], keep: Callable[[Any, Any], None] | None = None) -> Program:
    """Compiles what `lower` returns, reads what the compiler says of it, and calls `keep` with both where there is a program."""
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            # A program for a GPU that is not here enters JAX's cache, if one is kept, and cannot be read from it.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            lowered = lower()
            compiled: Any = lowered.compile() if keep is None else compile_anew(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(name, (time.perf_counter() - start, time.process_time() - cpu), str(error))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if keep is not None:
        keep(lowered, compiled)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or {}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    # Only a TPU's compiler lays out the whole memory; elsewhere its parts add up.
    peak = memory.peak_memory_in_bytes if mesh.devices.flat[0].platform == "tpu" else held
    return Program(
        name=name,
        compile_seconds=seconds,
        cpu_seconds=cpu,
        required=peak + memory.generated_code_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        xla_flops=cost.get("flops", 0.0),
        **read_program(text, mesh.size),
    )


def read_program(hlo_text: str, num_devices: int) -> dict[str, Any]:
    """Returns what a program's text tells: `flops`, `flops_complete`, `traffic`, and in `unknown` the figures that it does not."""
    flops, complete, sent, unknown = None, True, (), []
    try:
        flops, complete = program_flops(hlo_text)
    except UnknownText as reason:
        unknown.append(f"FLOPs: {reason}")
    try:
        sent, reasons = traffic(hlo_text, num_devices)
        unknown += [f"bytes of {kind}: {reason}" for kind, reason in reasons.items()]
    except UnknownText as reason:
        unknown.append(f"collectives: {reason}")
    return {"flops": flops, "flops_complete": complete, "traffic": sent, "unknown": tuple(unknown)}


def traffic(hlo_text: str, num_devices: int) -> tuple[tuple[Traffic, ...], dict[str, UnknownText]]:
    """Returns the collectives of a program by kind, and why the bytes of a kind are not known."""
    by_kind: dict[str, list[tuple[Collective, int]]] = {}
    unknown: dict[str, UnknownText] = {}
    for item in readable_collectives(hlo_text, num_devices):
        if isinstance(item, Unreadable):
            unknown.setdefault(item.kind, item.reason)
        elif item.count != 0 and item.group_size > 1:
            by_kind.setdefault(item.kind, []).append((item, item.count or 1))
    kinds = sorted({*by_kind, *unknown})
    return tuple(_traffic_of(kind, by_kind.get(kind, []), kind not in unknown) for kind in kinds), unknown


def _traffic_of(kind: str, found: list[tuple[Collective, int]], known: bool) -> Traffic:
    return Traffic(
        kind=kind,
        instructions=len(found),
        executions=sum(count for _, count in found),
        bytes=sum(c.bytes * count for c, count in found) if known else None,
        wire_bytes=round(sum(c.wire_bytes * count for c, count in found)) if known else None,
        complete=all(c.count is not None for c, _ in found),
    )


def _refused(name: str, times: tuple[float, float], message: str) -> Program:
    """Returns the program that the compiler had no memory for, with what it says that it would need."""
    refusal = message.split("\n\n")[0].strip()
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(message):
            return Program(name, *times, round(float(match.group(1)) * _UNITS[match.group(2)]), refusal=refusal)
    unknown = UnknownText("how much memory a program needs", refusal, source="The compiler")
    return Program(name, *times, None, refusal=refusal, unknown=(f"memory: {unknown}",))
