"""What is left of a task when 32 experts a layer become 8, and what a short fine-tuning wins back.

    flax-switch pretrain --config tiny --config.model.num_experts=32 --workdir runs/tiny_32
    python benchmarks/merging.py --sparse runs/tiny_32 --workdir runs/merging    # run it again to go on where it was stopped

The model is fine-tuned to write sentences again without their articles (the task of finetuning_peers.py); a score is the per cent
of 1,000 held-out sentences that come out right to the letter. Then

    shuffled    every layer's experts change places, the router stays: does it matter which expert a token goes to?
    merged      `flax-switch merge` to 8 experts, by how the training sentences use them
    pruned      `flax-switch prune` to the 8 that are used most
    random      8 experts drawn by a seed, three times

each as it is, and after 5 % of the steps of the fine-tuning once more. The whole model goes these steps, too, as a control.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import finetuning_peers as peers
import jax
import numpy as np
import run_record

import flax_switch as fs
from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.host.compile_cache import use_compile_cache
from flax_switch.workflows.finetune import evaluate_checkpoint, finetune
from flax_switch.workflows.regroup import fewer

EXPERTS = 8
SHARE = 0.05  # of the fine-tuning's steps, gone once more


def recipe(data: Path, steps: int, rate: float, seed: int) -> FinetuneRecipe:
    """Returns the fine-tuning on the sentences in a folder."""
    inputs_length, targets_length = peers.LENGTHS["rewriting"]
    return FinetuneRecipe(
        model=dict(dropout_rate=0.0),
        data=FinetuneDataConfig(
            train=str(data / "train.jsonl"), validation=str(data / "validation.jsonl"), inputs="text", targets="short",
            inputs_length=inputs_length, targets_length=targets_length, batch_size=peers.BATCH, seed=seed,
        ),
        optimizer=FinetuneOptimizerConfig(name="adamw", learning_rate=rate, schedule="linear", warmup_steps=min(20, steps // 3)),
        train=FinetuneTrainConfig(
            steps=steps, seed=seed, log_every=10, eval_every=steps, eval_batches=10, checkpoint_every=steps, sample_spans=0
        ),
        evaluation=EvaluationConfig(metrics=("accuracy",), batch_size=100, num_beams=1),
    )  # fmt: skip


def shuffle(model: Path, out: Path, seed: int) -> None:
    """Writes a model whose experts have changed places, none of them staying where it was."""
    opened = fs.load_pretrained(str(model))
    random, moves = np.random.default_rng(seed), {}

    def move(path: Any, leaf: Any) -> Any:
        names = [getattr(key, "key", "") for key in path]
        if "expert" not in names:
            return leaf
        layer = tuple(names[: names.index("expert")])
        if layer not in moves:
            cycle = random.permutation(len(leaf))  # each expert goes to the place of the next in a cycle of all
            moves[layer] = np.empty_like(cycle)
            moves[layer][cycle] = np.roll(cycle, 1)
        return leaf[moves[layer]]

    params = jax.tree_util.tree_map_with_path(move, opened.params)
    fs.save_pretrained(out, opened.config, params, opened.vocabulary, format="flax_switch")


class Runs:
    """What has been measured, kept in a folder: a name is measured once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data, self.kept = args, args.workdir / "data" / "rewriting", args.workdir / "scores"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, float] = {}

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """Returns the score of this name."""
        kept = self.kept / f"{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measure()))
        self.found[name] = json.loads(kept.read_text())
        print(f"  {name:32} {self.found[name]:5.1f}", flush=True)
        return self.found[name]

    def score(self, name: str, model: Path) -> float:
        """Returns the score of a model as it is."""
        settings = recipe(self.data, 1, self.args.rate, 0)
        return self.once(name, lambda: evaluate_checkpoint(settings, str(model))[1]["accuracy"])

    def tuned(self, name: str, model: Path, steps: int, rate: float, seed: int = 1) -> float:
        """Returns the score of a model after so many steps; the run is in the folder of the name."""

        def measure() -> float:
            finetune(recipe(self.data, steps, rate, seed), self.args.workdir / name, init=str(model))
            return evaluate_checkpoint(recipe(self.data, 1, rate, 0), str(self.args.workdir / name))[1]["accuracy"]

        return self.once(name, measure)


def reduced(args: argparse.Namespace, whole: Path, data: Path) -> dict[str, Path]:
    """Makes what is compared, where it is not there yet, and returns the folder of each."""
    inputs_length, targets_length = peers.LENGTHS["rewriting"]
    examples = FinetuneDataConfig(
        name="examples", validation=str(data / "train.jsonl"), inputs="text", targets="short", inputs_length=inputs_length,
        targets_length=targets_length, batch_size=peers.BATCH,
    )  # fmt: skip
    ways: dict[str, dict[str, Any]] = {"merged": dict(merge=True), "pruned": dict(merge=False)}
    ways |= {f"random {seed}": dict(merge=False, keep="random", seed=seed) for seed in range(3)}
    folders = {name: args.workdir / name.replace(" ", "_") for name in ways}
    for name, options in ways.items():
        if not folders[name].exists():
            fewer(whole, folders[name], num_experts=EXPERTS, examples=examples, batches=64, **options)
    return folders


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", type=Path, required=True, help="a run of 32 experts")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--short-rate", type=float, default=3e-4, help="of the short ones; at --rate even the whole model loses")
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "merging.json")
    args = parser.parse_args(argv)
    use_compile_cache()
    runs = Runs(args)
    if not runs.data.exists():
        peers.write_tasks(args.workdir / "data")
    short = round(SHARE * args.steps)
    whole = args.workdir / "whole"
    before = runs.tuned("whole", args.sparse, args.steps, args.rate)
    shuffled = args.workdir / "shuffled"
    if not shuffled.exists():
        shuffle(whole, shuffled, 0)
    runs.score("shuffled, as it is", shuffled)
    runs.tuned("whole, short", whole, short, args.short_rate)
    for name, folder in reduced(args, whole, runs.data).items():
        runs.score(f"{name}, as it is", folder)
        runs.tuned(f"{name}, short", folder, short, args.short_rate)
    for name, score in runs.found.items():
        print(f"{name:32} {score:6.1f} {score / before:8.1%}")
    results = {"steps": args.steps, "short_steps": short, "rate": args.rate, "short_rate": args.short_rate}
    run_record.write(args.output, {**results, "experts": [32, EXPERTS], "scores": runs.found})


if __name__ == "__main__":
    main()
