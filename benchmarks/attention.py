"""Fused attention against the plain form: a train step's memory where nothing runs, or time on this machine.

    python benchmarks/attention.py --topology v5e:4x4 --write    # T5-large's step, compiled: temporary memory at 2,048 and 8,192
    python benchmarks/attention.py --write                       # one attention of base size, forward and backward, on this CPU

A step's lengths equal no other of its sizes, so that the program's text tells whether an array has the axes of queries and keys
together. Times are CPU time, which other work on the machine does not stretch, and medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run_record

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
from flax_switch.ops.attention import dot_product_attention
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible
from flax_switch.parallel.mesh import create_mesh
from flax_switch.plan.memory import batch_structs
from flax_switch.plan.topology import compile_devices, parse_topology
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

T5_LARGE = SwitchConfig(
    d_model=1024, num_heads=16, d_kv=64, d_ff=4096, num_encoder_layers=24, num_decoder_layers=24, num_sparse_encoder_layers=0,
    num_sparse_decoder_layers=0, dtype="bfloat16", scan_layers=True,
)  # fmt: skip
TARGETS = 510
CASES = (  # form, length of the inputs, remat policy
    ("plain", 2048, "none"),
    ("fused", 2048, "none"),
    ("plain", 2048, "full"),
    ("fused", 2048, "full"),
    ("fused", 8192, "full"),
)


def paired(text: str, lengths: tuple[int, int]) -> set[str]:
    """Returns the shapes in a program's text that have two axes of these lengths, filled up to lanes or not."""
    axes = {size for length in lengths for size in (length, -(-length // 128) * 128)}
    shapes = set(re.findall(r"\b\w+\[[\d,]+\]", text))
    return {shape for shape in shapes if sum(int(size) in axes for size in re.findall(r"\d+", shape.partition("[")[2])) >= 2}


def step_memory(form: str, length: int, remat: str, topology: str, rows: int) -> dict[str, Any]:
    """Compiles a train step of `rows` rows for a topology, laid over its data axis with fsdp, and returns what a device holds."""
    machine = parse_topology(topology)
    config = ExperimentConfig(
        model=T5_LARGE.replace(attention_implementation=form, remat_policy=remat),
        data=DataConfig(batch_size=rows, inputs_length=length, targets_length=TARGETS),
        optimizer=OptimizerConfig(),
        mesh=MeshConfig(fsdp=True),
    )
    mesh = create_mesh(config.mesh, compile_devices(machine))
    run, start = build_run(config, mesh), time.perf_counter()
    row = {"form": form, "inputs_length": length, "remat_policy": remat, "batch_size": rows}
    try:
        compiled = compile_train_step(run).lower(run.abstract_state, batch_structs(config, mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "refusal": str(error).split("\n\n")[0].strip()}
    memory = compiled.memory_analysis()
    return row | {
        "fits": True,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "shapes_with_query_and_key_axes": sorted(paired(compiled.as_text(), (length, TARGETS))),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def attention_seconds(lengths: list[int], repeats: int, dtype: str) -> list[dict[str, Any]]:
    """Times forward and backward of both forms at each length: one row of 12 heads, a bias, padding."""
    rows = []
    for length in lengths:
        rng = np.random.default_rng(0)
        shape = (1, length, 12, 64)
        query, key, value, weights = (jnp.asarray(rng.normal(size=shape) / 4, dtype) for _ in range(4))
        table = jnp.asarray(rng.normal(size=(12, 32)), jnp.float32)
        real = jnp.arange(length)[None] < length - 7

        def loss(form, query, key, value, table, real=real, weights=weights, length=length):
            bias, visible = RelativeBias(table, True, 128), Visible(real, real)
            if form == "plain":
                bias, visible = bias.array(length, length), visible.array(length, length)
            return (dot_product_attention(query, key, value, bias=bias, mask=visible)[0] * weights).astype(jnp.float32).sum()

        steps = {}
        for form in ("plain", "fused"):
            step = jax.jit(jax.grad(functools.partial(loss, form), (0, 1, 2, 3)))
            steps[form] = step.lower(query, key, value, table).compile()
        times: dict[str, list[float]] = {form: [] for form in steps}
        for _ in range(repeats + 1):
            for form, step in steps.items():
                start = time.process_time()
                jax.block_until_ready(step(query, key, value, table))
                times[form].append(time.process_time() - start)
        medians = {form: statistics.median(each[1:]) for form, each in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["plain"][1:], times["fused"][1:], strict=True))
        temporary = {form: step.memory_analysis().temp_size_in_bytes for form, step in steps.items()}
        rows.append(
            {"length": length, "dtype": dtype, "cpu_seconds": medians, "fused_over_plain": ratio, "temporary_bytes": temporary}
        )
        print(f"{length:6} {dtype}: plain {medians['plain']:.3f} s, fused {medians['fused']:.3f} s, ratio {ratio:.2f}", flush=True)
    return rows


def main() -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="such as v5e:4x4 or h100:8; nothing runs")
    parser.add_argument("--rows", type=int, help="of a batch; by default one a device")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which rows of CASES to compile")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true", help="a file under benchmarks/results")
    args = parser.parse_args()
    name = "attention_" + (args.topology or "cpu").replace(":", "_")

    def keep(results: list[dict[str, Any]]) -> None:
        if args.write:
            run_record.write(run_record.RESULTS / f"{name}.json", {"results": results}, device=args.topology)

    if not args.topology:
        keep(attention_seconds(args.lengths, args.repeats, args.dtype))
        return
    results = []
    for case in args.cases:  # a program takes minutes to compile, so that what is known is written after each
        form, length, remat = CASES[case]
        results.append(step_memory(form, length, remat, args.topology, args.rows or parse_topology(args.topology).num_devices))
        print(results[-1], flush=True)
        keep(results)


if __name__ == "__main__":
    main()
