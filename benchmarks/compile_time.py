"""Compile time of the train step against depth: a scanned model of 24 layers should take at most 1.5 times one of 4.

    python benchmarks/compile_time.py [--output benchmarks/results/compile_time.json]

Prints a table of seconds to trace, lower and compile (medians of three), scanned and unrolled, and the ratio to 4 layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import run_record

from flax_switch.config import DataConfig, ExperimentConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step


def compile_seconds(layers: int, scan: bool) -> float:
    """Seconds to trace, lower and compile the train step of a model with `layers` + `layers` layers."""
    model = PRESETS["switch-tiny"].replace(
        num_encoder_layers=layers, num_decoder_layers=layers, num_sparse_encoder_layers=layers // 2,
        num_sparse_decoder_layers=layers // 2, scan_layers=scan,
    )  # fmt: skip
    config = ExperimentConfig(model=model, data=DataConfig(batch_size=8), train=TrainConfig(steps=10))
    run = build_run(config, create_mesh(config.mesh, jax.devices()[:1]))
    lengths = {"input_ids": 64, "attention_mask": 64, "decoder_input_ids": 32, "decoder_attention_mask": 32, "labels": 32}
    batch = {name: jax.ShapeDtypeStruct((8, length), jnp.int32) for name, length in lengths.items()}
    jax.clear_caches()
    start = time.perf_counter()
    compile_train_step(run).lower(run.abstract_state, batch).compile()
    return time.perf_counter() - start


def main() -> None:
    """Measures depths in turn, three times over, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 24])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unrolled", action="store_true", help="measure unrolled layers too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    forms = [True, False] if args.unrolled else [True]
    seconds = {(depth, scan): [] for scan in forms for depth in args.depths}
    for _ in range(args.repeats):
        for key in seconds:
            seconds[key].append(compile_seconds(*key))
    rows = []
    print(f"| layers | form | seconds (min to max) | ratio to {args.depths[0]} layers |\n|---|---|---|---|")
    for (depth, scan), times in seconds.items():
        median, low, high = statistics.median(times), min(times), max(times)
        ratio = median / statistics.median(seconds[(args.depths[0], scan)])
        rows.append({"layers": depth, "scanned": scan, "seconds": median, "min": low, "max": high, "ratio": ratio})
        form = "scanned" if scan else "unrolled"
        print(f"| {depth}+{depth} | {form} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} |")
    if args.output:
        run_record.write(args.output, {"rows": rows}, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
