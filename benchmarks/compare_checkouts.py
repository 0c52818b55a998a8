"""Two checkouts of this repository beside each other: generation and the train step, interleaved, with the first against itself.

    python benchmarks/compare_checkouts.py ../before .                           # every cell, 20 pairs
    python benchmarks/compare_checkouts.py ../before . --cells train-small --pairs 40

Three workers run at once, each a process that imports one checkout: A, A again as the control, and B. They hold the same random
weights and batch and take turns, the order reversed every time, so that whatever else the machine does falls on all of them. A
cell's ratio is the median over pairs of A's seconds through B's: above 1, B is faster. The control is the same of A and its twin;
where that is further from 1 than 3 %, its distance is the limit of what can be said. Compile seconds are told apart, as
seconds of the processor: the median over --starts of fresh processes of the first run's beyond a usual one's. Each of these has the
machine to itself, as three large models at once would be timed for the memory that they take from each other. Quiet machines only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTLE = 0.05  # seconds after a run: idle threads of the one would slow the next
SMALL = dict(
    vocab_size=8192, d_model=256, d_ff=1024, d_kv=64, num_heads=4, num_encoder_layers=4, num_decoder_layers=4,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=8, capacity_mode="dropless",
)  # fmt: skip
BASE = dict(
    SMALL, vocab_size=32128, d_model=768, d_ff=3072, num_heads=12, num_encoder_layers=12, num_decoder_layers=12,
    num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
)  # fmt: skip
BASE_4 = dict(  # base-8's width; its depth would not fit beside two others
    BASE, num_encoder_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
)  # fmt: skip
CELLS: dict[str, dict[str, Any]] = {
    "greedy-small-1": dict(model=SMALL, batch=1),
    "greedy-small-8": dict(model=SMALL, batch=8),
    "beams-small-1": dict(model=SMALL, batch=1, num_beams=4),
    "beams-small-8": dict(model=SMALL, batch=8, num_beams=4),
    "sample-small-8": dict(model=SMALL, batch=8, do_sample=True, num_return_sequences=2),
    "dense-small-1": dict(model=dict(SMALL, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0), batch=1),
    "bfloat16-small-8": dict(model=dict(SMALL, dtype="bfloat16"), batch=8),
    "greedy-base-1": dict(model=BASE, batch=1),
    "beams-base-1": dict(model=BASE, batch=1, num_beams=4),
    "train-small": dict(model=SMALL, batch=4, train=True),
    "train-base": dict(model=BASE_4, batch=2, train=True),
}
DEFAULT = [name for name in CELLS if "base" not in name]


def worker() -> None:
    """Answers each line of standard input, a cell's name, with seconds and a figure to compare, as JSON; runs in a checkout."""
    import jax
    import numpy as np

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    runs: dict[str, Any] = {}
    for line in sys.stdin:
        name = line.strip()
        cell = CELLS[name]
        if name not in runs:
            runs = {name: train_run(cell, jax, np) if cell.get("train") else generate_run(cell, jax, np)}
        start, cpu = time.perf_counter(), time.process_time()
        result = runs[name]()
        print(json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "result": result}))


def generate_run(cell: dict[str, Any], jax, np):
    """A function that generates 32 tokens for sources of 256 and returns a checksum of them."""
    import flax_switch as fs

    config = fs.SwitchConfig(**cell["model"])
    model = fs.SwitchTransformer(config)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (cell["batch"], 256), dtype=np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids[:1, :1], ids[:1, :1])["params"]
    controls = {name: value for name, value in cell.items() if name not in ("model", "batch")}

    def run() -> int:
        output = fs.generate(model, params, ids, np.ones_like(ids), max_new_tokens=32, min_new_tokens=32, **controls)
        return int(
            (output.sequences.astype(np.int64) * np.arange(1, output.sequences.size + 1).reshape(output.sequences.shape)).sum()
        )

    return run


def train_run(cell: dict[str, Any], jax, np):
    """A function that makes one step (source 256, target 64, AdamW, float32) and returns the loss."""
    from flax_switch.config import ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
    from flax_switch.training.state import build_run, init_state
    from flax_switch.training.step import compile_train_step

    try:
        from flax_switch.parallel.mesh import create_mesh, shard_batch
    except ModuleNotFoundError:  # checkouts of 0.1
        from flax_switch.partitioning import create_mesh, shard_batch  # type: ignore[import-not-found,no-redef]

    model = SwitchConfig(**cell["model"])
    optimizer = OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-3, warmup_steps=0)
    experiment = ExperimentConfig(model=model, optimizer=optimizer)
    rng = np.random.default_rng(0)
    labels = rng.integers(2, model.vocab_size, (cell["batch"], 64), dtype=np.int32)
    inputs = rng.integers(2, model.vocab_size, (cell["batch"], 256), dtype=np.int32)
    shifted = np.pad(labels[:, :-1], ((0, 0), (1, 0)))
    arrays = dict(input_ids=inputs, decoder_input_ids=shifted, labels=labels)
    masks = dict(attention_mask=np.ones_like(inputs), decoder_attention_mask=np.ones_like(labels))
    run = build_run(experiment, create_mesh(MeshConfig(), jax.devices()[:1]))
    state = [init_state(run)]
    batch, compiled = shard_batch({**arrays, **masks}, run.mesh), compile_train_step(run)

    def step() -> float:
        state[0], metrics = compiled(state[0], batch)
        jax.block_until_ready(state[0])
        return float(metrics["cross_entropy"])

    return step


class Worker:
    """A process that runs cells with one checkout's package."""

    def __init__(self, checkout: Path) -> None:
        environment = dict(os.environ, PYTHONPATH=str(checkout.resolve()))
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )

    def run(self, cell: str) -> dict[str, Any]:
        """Runs a cell once."""
        assert self.process.stdin is not None and self.process.stdout is not None
        time.sleep(SETTLE)
        self.process.stdin.write(cell + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"A worker ended with status {self.process.wait()} in {cell}; what it said is above.")
        return json.loads(answer)

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(folders: dict[str, Path]) -> Iterator[dict[str, Worker]]:
    """Yields a worker in every folder."""
    workers = {name: Worker(folder) for name, folder in folders.items()}
    try:
        yield workers
    finally:
        for one in workers.values():
            one.stop()


def first_runs(folders: dict[str, Path], cell: str, number: int) -> dict[str, dict[str, Any]]:
    """What the first run of a process in every folder took, one process at a time; the order is turned round each time."""
    runs = {}
    for name in list(folders)[:: -1 if number % 2 else 1]:
        with started({name: folders[name]}) as workers:
            runs[name] = workers[name].run(cell)
    return runs


def measure(folders: dict[str, Path], cell: str, pairs: int, warm_up: int, starts: int) -> dict[str, Any]:
    """Seconds of all workers by turns, and their ratios."""
    firsts = [first_runs(folders, cell, number) for number in range(starts)]
    with started(folders) as workers:
        return compare(workers, cell, pairs, warm_up, firsts)


def compare(workers: dict[str, Worker], cell: str, pairs: int, warm_up: int, firsts: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs warm workers by turns and puts the figures together."""
    first = firsts[-1]
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    cpu: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(1 + warm_up + pairs):  # one more, which compiles
        for name in list(workers)[:: 1 if number % 2 else -1]:
            run = workers[name].run(cell)
            seconds[name].append(run["seconds"])
            cpu[name].append(run["cpu"])
    seconds, cpu = ({name: values[1 + warm_up :] for name, values in each.items()} for each in (seconds, cpu))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(seconds["A"], seconds[name], strict=True)) for name in ("control", "B")}
    compile_seconds = {
        name: statistics.median(run[name]["cpu"] for run in firsts) - statistics.median(cpu[name]) for name in workers
    }
    return dict(
        cell=cell,
        ratio=ratios["B"],
        control=ratios["control"],
        milliseconds={name: 1e3 * value for name, value in middle.items()},
        compile_seconds=compile_seconds,
        compile_ratio=2 * compile_seconds["B"] / (compile_seconds["A"] + compile_seconds["control"]),
        same_results=first["A"]["result"] == first["B"]["result"],
        seconds=seconds,
    )


def main() -> None:
    """Prints a row for each cell and writes all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="folder of checkout A")
    parser.add_argument("after", type=Path, nargs="?", help="folder of checkout B")
    parser.add_argument("--cells", nargs="+", default=DEFAULT, choices=CELLS)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes whose first runs are timed")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compare_checkouts.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    if args.before is None or args.after is None:
        parser.error("two checkouts are compared: give the folders of A and B.")
    import run_record

    rows: list[dict[str, Any]] = []
    print(f"{'cell':18}  B through A  control  ms A   ms B   compile s A  B   same results")
    for cell in args.cells:
        folders = {"A": args.before, "control": args.before, "B": args.after}
        row = measure(folders, cell, args.pairs, args.warm_up, args.starts)
        rows.append(row)
        times, compiled = row["milliseconds"], row["compile_seconds"]
        print(
            f"{cell:18} {row['ratio']:11.3f} {row['control']:9.3f} {times['A']:6.1f} {times['B']:6.1f} "
            f"{compiled['A']:9.1f} {compiled['B']:6.1f}   {row['same_results']}",
            flush=True,
        )
    commits = {
        name: subprocess.run(
            ["git", "-C", str(folder), "log", "-1", "--format=%h %s"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name, folder in (("A", args.before), ("B", args.after))
    }
    run_record.write(args.output, dict(commits=commits, pairs=args.pairs, rows=rows))


if __name__ == "__main__":
    main()
