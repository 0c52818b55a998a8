"""Time of fused attention beside the plain form on this machine: forward and backward, of base size.

    python benchmarks/attention.py --write

Times are CPU time, which other work on the machine does not stretch, and medians of interleaved runs. What a train step's memory
becomes is in compiled_programs.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run_record

from flax_switch.ops.attention import dot_product_attention
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible


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
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true", help="a file under benchmarks/results")
    args = parser.parse_args()
    results = attention_seconds(args.lengths, args.repeats, args.dtype)
    if args.write:
        run_record.write(run_record.RESULTS / "attention_cpu.json", {"results": results})


if __name__ == "__main__":
    main()
