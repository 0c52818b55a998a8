"""How many tokens a second the data pipeline delivers by itself, for small and large recipes and numbers of workers.

    python benchmarks/data_pipeline.py [--seconds 5] [--workers 0 1 2] [--json results.json]

Reads the embedded corpus (the first time it is extracted and tokenised). Tokens are those the model sees: inputs and targets
without padding. `tokens/s` is wall-clock time, `tokens/cpu-s` divides by the CPU time of this process, so it tells the
pipeline's cost even on a busy machine (with workers it counts only what is left to the main process).
"""

from __future__ import annotations

import argparse
import time

import run_record

from flax_switch.config import DataConfig
from flax_switch.data import prepare

_TINY = DataConfig(vocabulary_size=512, inputs_length=64, targets_length=32, batch_size=32)
CASES = {
    "tiny": _TINY,
    "tiny, half prefix-LM": _TINY.replace(prefix_lm_rate=1.0),
    "tiny, packed": _TINY.replace(packing=True),
    "512/114, batch 128": DataConfig(vocabulary_size=8000),
    "512/114, batch 128, packed": DataConfig(vocabulary_size=8000, packing=True),
}


def measure(config: DataConfig, num_workers: int, seconds: float) -> dict[str, float]:
    """Rates over about `seconds`, after the first batches; raises where the pipeline fails."""
    iterator = prepare(config, quiet=True).train_iterator(num_workers=num_workers)
    for _ in range(2 * config.prefetch):
        next(iterator)
    tokens = batches = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        batch = next(iterator)
        tokens += int(batch["attention_mask"].sum() + batch["decoder_attention_mask"].sum())
        batches += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    iterator.close()
    return {
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "milliseconds_per_batch": 1000 * wall / batches,
        "tokens_per_batch": tokens / batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row of the table")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    results = []
    print(f"{'recipe':28} {'workers':>7} {'tokens/s':>12} {'tokens/cpu-s':>13} {'ms/batch':>9} {'tokens/batch':>13}")
    for name, config in CASES.items():
        for workers in arguments.workers:
            row = measure(config, workers, arguments.seconds)
            results.append({"recipe": name, "workers": workers, **row})
            print(
                f"{name:28} {workers:7d} {row['tokens_per_second']:12,.0f} {row['tokens_per_cpu_second']:13,.0f} "
                f"{row['milliseconds_per_batch']:9.3f} {row['tokens_per_batch']:13,.0f}",
                flush=True,
            )
    if arguments.json:
        run_record.write(arguments.json, {"results": results})


if __name__ == "__main__":  # worker processes import this file again
    main()
