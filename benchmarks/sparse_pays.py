"""Does sparsity pay? Dense and sparse models of equal FLOPs a token on equal data, each with its own learning rate.

    python benchmarks/sparse_pays.py --task recall --workdir runs/recall
    python benchmarks/sparse_pays.py --task text --source data/code --workdir runs/text --cells dense 4 8 16 32 64
    python benchmarks/sparse_pays.py --task text --source data/code --workdir runs/text --cells 16 16-wide-init+capacity-1

recall: random pairs of four letters and four letters, as in a phone book, that have to be learned by heart; what is measured is the
loss over the pairs themselves. text: infilling of --source (scripts/data/source_code.py makes one), measured on held-out text.

Every cell is trained at each of --rates with the first seed, and at the best of them with the others. A run that has finished is
in WORKDIR/runs and is not run again, so a sweep can be stopped and goes on, and cells can be added. In the end a table is printed,
and the sweep written to --output with a picture of the same name: loss over steps, tokens and CPU seconds with compilation, and
over the number of experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import run_record

from flax_switch import data
from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.inspection.specialisation import specialisation
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.evaluate import mean_metrics
from flax_switch.training.state import Run, build_run, init_state
from flax_switch.training.step import compile_eval_step, compile_train_step, forward

Batch = dict[str, np.ndarray]
LETTERS, LENGTH = 26, 4  # of a key and of its value

# What a cell of E experts changes besides, by what its name ends with.
VARIANTS: dict[str, dict[str, Any]] = {
    "router-bfloat16": dict(router_dtype="bfloat16"),
    "tenth-init": dict(init_scale=0.1),
    "capacity-1": dict(capacity_mode="factor", capacity_factor=1.0, eval_capacity_factor=1.0),
    "capacity-1.25": dict(capacity_mode="factor", capacity_factor=1.25, eval_capacity_factor=1.25),
    "capacity-2": dict(capacity_mode="factor", capacity_factor=2.0, eval_capacity_factor=2.0),
    "even-init": dict(router_init_std=0.02),
    "wide-init": dict(router_init_std=3.0),  # sure of itself from the start
    "hash": dict(router_type="hash"),
    "little-balance": dict(load_balancing_loss_coef=0.001),
    "top-2": dict(num_selected_experts=2, expert_d_ff="half"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What models learn: training batches from a seed on, and batches to measure on."""

    config: ExperimentConfig
    train: Callable[[int], Iterator[Batch]]
    measured: Callable[[], Iterable[Batch]]
    vocabulary: Any


@dataclasses.dataclass(frozen=True)
class _Letters:
    """What `mean_metrics` asks of a vocabulary: every letter is text."""

    num_pieces: int = LETTERS + 2
    eos_id: int = 1


def recall(args: argparse.Namespace) -> Task:
    """Random pairs of letters, the same for all seeds; seeds draw their order."""
    random = np.random.default_rng(0)
    keys = np.unique(random.integers(0, LETTERS**LENGTH, 2 * args.pairs))
    keys = random.permutation(keys)[: args.pairs]
    letters = keys[:, None] // LETTERS ** np.arange(LENGTH) % LETTERS
    pairs = np.stack([letters, random.integers(0, LETTERS, letters.shape)]).astype(np.int32) + 2

    def batch(rows: np.ndarray) -> Batch:
        inputs, labels = pairs[:, rows]
        shifted = np.pad(labels[:, :-1], ((0, 0), (1, 0)))
        ones = np.ones_like(labels)
        return dict(
            input_ids=inputs, decoder_input_ids=shifted, labels=labels, attention_mask=ones, decoder_attention_mask=ones,
        )  # fmt: skip

    def train(seed: int) -> Iterator[Batch]:
        order, left = np.random.default_rng(seed), np.empty(0, int)
        while True:
            if len(left) < args.batch_size:
                left = np.concatenate([left, order.permutation(args.pairs)])
            yield batch(left[: args.batch_size])
            left = left[args.batch_size :]

    model = dict(vocab_size=128, d_model=32, d_ff=64, num_heads=4, d_kv=8)
    splits = np.array_split(np.arange(args.pairs), args.pairs // 1000)
    return Task(
        _config(args, model, DataConfig(inputs_length=LENGTH, targets_length=LENGTH, batch_size=args.batch_size)),
        train, lambda: map(batch, splits), _Letters(),
    )  # fmt: skip


def text(args: argparse.Namespace) -> Task:
    """Infilling of the text in --source."""
    config = DataConfig(
        source=tuple(args.source), document_separator="blank_line", vocabulary_size=1024, inputs_length=64, targets_length=88,
        batch_size=args.batch_size, span_corruption_rate=0.0, infilling_rate=1.0, noise_density=0.3,
        cache_dir=str(args.workdir / "cache"), heldout_fraction=0.01,
    )  # fmt: skip
    prepared = data.prepare(config, workdir=args.workdir)
    sizes = dict(d_model=args.d_model, d_ff=args.d_ff, num_heads=4, d_kv=args.d_model // 4, copying_heads=2)
    model = dict(vocab_size=prepared.vocabulary.padded_size, **sizes)

    def train(seed: int) -> Iterator[Batch]:
        return dataclasses.replace(prepared, config=config.replace(seed=seed)).train_iterator()

    return Task(_config(args, model, config), train, lambda: prepared.heldout_batches(40), prepared.vocabulary)


def _config(args: argparse.Namespace, sizes: dict[str, Any], config: DataConfig) -> ExperimentConfig:
    model = SwitchConfig(
        **sizes, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
        capacity_mode="dropless", routing_group="tokens", group_size=65536, router_init_std=sizes["d_model"] ** -0.5,
        load_balancing_loss_coef=0.01, init_scale=1.0, dropout_rate=0.0, ignore_padding_tokens=True,
    )  # fmt: skip
    optimizer = OptimizerConfig(name=args.optimizer, schedule=args.schedule, warmup_steps=100, b2=0.98, learning_rate=1.0)
    return ExperimentConfig(model=model, data=config, optimizer=optimizer, train=TrainConfig(steps=args.steps))


def cell_config(config: ExperimentConfig, cell: str, rate: float, seed: int) -> ExperimentConfig:
    """Returns the run of a cell: "dense" or a number of experts, maybe with variants behind it: "16-wide-init+capacity-1"."""
    experts, _, variants = cell.partition("-")
    changes = {name: value for variant in filter(None, variants.split("+")) for name, value in VARIANTS[variant].items()}
    if experts == "dense":
        changes |= dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    else:
        changes |= dict(num_experts=int(experts))
        if changes.get("expert_d_ff") == "half":  # two experts of half the width cost what one costs
            changes["expert_d_ff"] = config.model.d_ff // 2
    return config.replace(
        model=config.model.replace(**changes),
        optimizer=config.optimizer.replace(learning_rate=rate),
        train=config.train.replace(seed=seed),
    )


def train(task: Task, cell: str, rate: float, seed: int, every: int) -> dict[str, Any]:
    """Trains one model and returns its curve: step, seconds and CPU seconds of training so far, and loss, measured `every` steps.

    Seconds include compilation and leave measuring out. Beside them stand what the routers did at the end.
    """
    config = cell_config(task.config, cell, rate, seed)
    run = build_run(config, create_mesh(config.mesh))
    state, batches = init_state(run), task.train(seed)
    step, evaluate = compile_train_step(run), compile_eval_step(run)
    curve, seconds, cpu, found = [], 0.0, 0.0, {}
    for first in range(0, config.train.steps, every):
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(first, min(first + every, config.train.steps)):
            state, _ = step(state, next(batches))
        jax.block_until_ready(state.params)
        seconds, cpu = seconds + time.perf_counter() - began, cpu + time.process_time() - cpu_began
        found = mean_metrics(run, evaluate, state.params, task.measured(), task.vocabulary)
        curve.append([int(state.step), round(seconds, 2), round(cpu, 2), round(found["text_cross_entropy"], 5)])
        print(f"{cell}, rate {rate}, seed {seed}: step {curve[-1][0]}, {seconds:.0f} s, loss {curve[-1][3]:.4f}", flush=True)
    if hasattr(batches, "close"):
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    routers = {name.removeprefix("routers/"): value for name, value in found.items() if name.startswith("routers/")}
    return dict(
        cell=cell, rate=rate, seed=seed, parameters=sum(x.size for x in jax.tree.leaves(state.params)), curve=curve,
        dropped=routers.get("fraction_tokens_left_behind", []), confidence=routers.get("router_confidence", []),
        entropy=routers.get("router_entropy", []), token_bits=_token_bits(run, state.params, task),
    )  # fmt: skip


def _token_bits(run: Run, params: Any, task: Task) -> list[float]:
    """What a token says about its expert, in bits, for every sparse layer."""
    batch = next(iter(task.measured()))
    output = jax.jit(lambda params, batch: forward(run.model, params, batch, None))(params, batch)
    stacks = [(output.encoder_router, "input_ids", "attention_mask")]
    stacks.append((output.decoder_router, "decoder_input_ids", "decoder_attention_mask"))
    return [
        round(specialisation(np.asarray(router.expert_index)[:, :, 0][real], batch[ids][real]), 3)
        for routers, ids, mask in stacks
        for router in routers
        for real in [batch[mask].astype(bool)]
    ]


def sweep(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what has not been run: every rate with the first seed, then the best rate with the others. Returns the latter."""
    folder = args.workdir / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = f"{args.pairs}" if args.task == "recall" else f"{args.d_model}-{args.d_ff}-{args.batch_size}"

    def result(cell: str, rate: float, seed: int) -> dict[str, Any]:
        path = folder / f"{args.task}-{cell}-{rate}-{seed}-{args.steps}-{args.optimizer}-{args.schedule}-{sizes}.json"
        if not path.exists():
            path.write_text(json.dumps(train(task, cell, rate, seed, args.every)))
        return json.loads(path.read_text())

    tuned = []
    for cell in args.cells:
        tried = {rate: final_loss(result(cell, rate, 0)) for rate in args.rates}
        best = min(tried, key=lambda rate: tried[rate])
        seeds = [result(cell, best, seed) for seed in range(args.seeds)]
        tuned.append(dict(cell=cell, rate=best, rates={str(rate): loss for rate, loss in tried.items()}, runs=seeds))
    return tuned


def final_loss(run: dict[str, Any]) -> float:
    """Returns the loss at the end of a run; infinite where it is no number."""
    loss = run["curve"][-1][3]
    return loss if np.isfinite(loss) else float("inf")


def reached(run: dict[str, Any], loss: float) -> list[float] | None:
    """Returns the first point of a run's curve that is no higher than a loss; None where it never is."""
    return next((point for point in run["curve"] if point[3] <= loss), None)


def summary(tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each cell its final losses, and how long it took to the best dense cell's final loss with the same seed."""
    plain = [cell["runs"] for cell in tuned if _experts(cell) == 1]
    dense = min(plain, key=lambda runs: statistics.median(map(final_loss, runs)), default=[])
    rows = []
    for cell in tuned:
        pairs = [(run, other) for run, other in itertools.zip_longest(cell["runs"], dense) if run and other]
        points = [(reached(run, final_loss(other)), other["curve"][-1]) for run, other in pairs]
        last = cell["runs"][0]
        rows.append(dict(
            cell=cell["cell"], rate=cell["rate"], parameters=last["parameters"], losses=[final_loss(run) for run in cell["runs"]],
            steps_of_dense=[point and round(point[0] / end[0], 3) for point, end in points],
            seconds_of_dense=[point and round(point[1] / end[1], 2) for point, end in points],
            cpu_of_dense=[point and round(point[2] / end[2], 2) for point, end in points],
            **{name: [round(float(x), 3) for x in last[name]] for name in ("dropped", "confidence", "entropy", "token_bits")},
        ))  # fmt: skip
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the table that docs have."""
    heads = ("cell", "rate", "parameters", "loss, median (min to max)", "of the dense model's steps", "of its CPU time",
             "confidence", "token bits")  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        losses = row["losses"]
        shares = [" ".join("never" if x is None else f"{x:.2f}" for x in row[k]) for k in ("steps_of_dense", "cpu_of_dense")]
        routers = [", ".join(f"{x:.2f}" for x in row[name]) for name in ("confidence", "token_bits")]
        print(
            f"| {row['cell']} | {row['rate']} | {row['parameters']:,} | {statistics.median(losses):.3f} "
            f"({min(losses):.3f} to {max(losses):.3f}) | {' | '.join(shares + routers)} |"
        )


def _end(cell: dict[str, Any]) -> str:
    """Returns the name of a cell's variant, "" for none."""
    return cell["cell"].partition("-")[2]


def _experts(cell: dict[str, Any]) -> int:
    """Returns a cell's number of experts, 1 for the dense model."""
    experts = cell["cell"].partition("-")[0]
    return 1 if experts == "dense" else int(experts)


def draw(tuned: list[dict[str, Any]], tokens_a_step: int, path: Path) -> None:
    """Draws loss over steps, tokens, CPU seconds and experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for number, cell in enumerate(tuned):
        for run in cell["runs"]:
            curve = np.asarray(run["curve"])
            style = dict(color=f"C{number}", lw=1, label=cell["cell"] if run is cell["runs"][0] else None)
            for axis, x in zip(axes, (curve[:, 0], curve[:, 0] * tokens_a_step / 1e6, curve[:, 2]), strict=False):
                axis.plot(x, curve[:, 3], **style)
    dense = [cell for cell in tuned if cell["cell"] == "dense"]
    for number, end in enumerate(sorted({_end(cell) for cell in tuned if cell not in dense})):
        line = sorted((cell for cell in tuned if cell not in dense and _end(cell) == end), key=_experts)
        line = line if _experts(line[0]) == 1 else dense + line
        points = [(_experts(cell), [final_loss(run) for run in cell["runs"]]) for cell in line]
        style = dict(color=f"C{number}", ms=4)
        axes[3].plot([x for x, losses in points for _ in losses], [y for _, losses in points for y in losses], "o", **style)
        medians = [statistics.median(losses) for _, losses in points]
        axes[3].plot([x for x, _ in points], medians, lw=1, label=end or "learned router", **style)
    axes[3].legend(frameon=False)
    axes[3].set_xscale("log", base=2)
    late = np.concatenate([np.asarray(run["curve"])[len(run["curve"]) // 8 :, 3] for cell in tuned for run in cell["runs"]])
    for axis in axes[:3]:  # without the first losses, beside which the differences would not be seen
        axis.set_ylim(0.98 * late.min(), 1.02 * late.max())
    names = ("steps", "million tokens, inputs and targets", "CPU seconds, compilation included", "experts (1: dense), at the end")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats a token")
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the sweep, prints the table, writes JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("recall", "text"), required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--source", nargs="+", default=[], help="of --task text: files, folders or globs")
    parser.add_argument("--cells", nargs="+", default=["dense", "4", "8", "16", "32", "64"], help=f"16-A+B: {', '.join(VARIANTS)}")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.003, 0.01])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--batch-size", type=int, default=0, help="default: 256 pairs, or 48 rows of text")
    parser.add_argument("--d-model", type=int, default=128, help="of --task text")
    parser.add_argument("--d-ff", type=int, default=256, help="of --task text: of each expert, and of the dense MLP")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--schedule", default="constant", help="at a constant rate a step is worth the same in every run")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/sparse_pays_TASK.json")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (256 if args.task == "recall" else 48)
    args.workdir.mkdir(parents=True, exist_ok=True)
    task = recall(args) if args.task == "recall" else text(args)
    tuned = sweep(task, args)
    rows = summary(tuned)
    print_table(rows)
    output = args.output or run_record.RESULTS / f"sparse_pays_{args.task}.json"
    shape = task.config.data
    tokens = shape.batch_size * (shape.inputs_length + shape.targets_length)
    draw(tuned, tokens, output.with_suffix(".png"))
    run_record.write(output, {"summary": rows, "cells": tuned})


if __name__ == "__main__":
    main()
