"""An adapter beside full fine-tuning: the same steps on the same examples, three seeds of each.

    flax-switch pretrain --config configs/tiny.py --workdir runs/tiny        # the model that both begin with
    python benchmarks/lora.py --init runs/tiny --workdir runs/lora           # run it again to go on where it was stopped

The task is an edit that can be told to be right: a sentence of the quickstart's corpus, written again without its articles. The
score is the share of held-out sentences that are right to the letter; the control is the model before fine-tuning. First every way
picks its learning rate, with a seed of its own; then it runs with three other seeds, which draw the order of examples, dropout and
the adapter. Printed and written are scores, bytes of a checkpoint, and seconds a step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import run_record

from flax_switch.config.adapter import AdapterConfig
from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.data.corpus import default_corpus
from flax_switch.host.files import cache_folder
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.finetune import evaluate_checkpoint, finetune

ARTICLES = re.compile(r"\b(?:a|an|the) ")


class Way(NamedTuple):
    """How a model is fine-tuned, and the learning rates to pick from."""

    adapter: AdapterConfig
    optimizer: str
    rates: tuple[float, ...]


WAYS = {
    "full": Way(AdapterConfig(), "adamw_rms", (3e-3, 1e-2, 3e-2)),
    "LoRA": Way(AdapterConfig(rank=8, alpha=16.0), "adamw", (3e-3, 1e-2)),  # at 3e-2 it diverges
    "LoRA-32": Way(AdapterConfig(rank=32, alpha=64.0), "adamw", (3e-3,)),  # at 5e-3 it is not stable
    "DoRA": Way(AdapterConfig(rank=8, alpha=16.0, use_dora=True), "adamw", (3e-3, 1e-2)),
}
PICKING, SEEDS = 100, (1, 2, 3)


def write_task(folder: Path, validation: int) -> dict[str, int]:
    """Writes train.jsonl and validation.jsonl, once; a sentence's side follows from its hash."""
    if not (folder / "validation.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, str] = {}
        for document in default_corpus(cache_folder(None)):
            for sentence in re.split(r"(?<=\.) ", document):
                if 4 <= len(sentence.split()) <= 10 and len(sentence) <= 60 and ARTICLES.search(sentence):
                    found[sentence] = hashlib.sha256(sentence.encode()).hexdigest()
        rows = sorted(found, key=found.__getitem__)
        for name, part in (("validation", rows[:validation]), ("train", rows[validation:])):
            lines = (json.dumps({"text": text, "short": ARTICLES.sub("", text)}) for text in part)
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {name: len((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "validation")}


def recipe_of(way: str, rate: float, seed: int, data: Path, steps: int) -> FinetuneRecipe:
    """Returns what a run does."""
    chosen = WAYS[way]
    return FinetuneRecipe(
        data=FinetuneDataConfig(
            train=str(data / "train.jsonl"), validation=str(data / "validation.jsonl"), inputs="text", targets="short",
            inputs_length=40, targets_length=40, batch_size=32, seed=seed,
        ),
        optimizer=FinetuneOptimizerConfig(name=chosen.optimizer, learning_rate=rate, schedule="linear", warmup_steps=20),
        train=FinetuneTrainConfig(
            steps=steps, seed=seed, log_every=20, eval_every=steps, eval_batches=10, checkpoint_every=steps, sample_spans=0
        ),
        evaluation=EvaluationConfig(metrics=("accuracy",), batch_size=100, num_beams=1),
        adapter=chosen.adapter,
    )  # fmt: skip


def run_of(way: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a run measured; one that has ended is not run again."""
    workdir = args.workdir / f"{way}_{rate:g}_{seed}"
    kept = workdir / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    finetune(recipe_of(way, rate, seed, args.workdir / "data", args.steps), workdir, init=str(args.init))
    lines = read_metrics(workdir)
    last = next(line for line in reversed(lines) if line["kind"] == "eval")
    step = workdir / "checkpoints" / str(args.steps)
    measured = {
        "way": way, "learning_rate": rate, "seed": seed, "accuracy": last["accuracy"], "cross_entropy": last["cross_entropy"],
        "seconds_per_step": statistics.median(line["seconds_per_step"] for line in lines[2:] if line["kind"] == "train"),
        "checkpoint_bytes": sum(path.stat().st_size for path in step.rglob("*") if path.is_file()),
    }  # fmt: skip
    kept.write_text(json.dumps(measured) + "\n")
    return measured


def main() -> None:
    """Runs all, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["full", "LoRA", "LoRA-32"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "lora.json")
    args = parser.parse_args()
    examples = write_task(args.workdir / "data", args.validation)
    untouched = evaluate_checkpoint(recipe_of("full", 1e-3, PICKING, args.workdir / "data", args.steps), str(args.init))[1]
    before = {name: untouched[name] for name in ("accuracy", "cross_entropy")}
    runs, picked = [], {}
    for way in args.ways:
        rates = WAYS[way].rates
        trials = [run_of(way, rate, PICKING, args) for rate in rates] if len(rates) > 1 else []
        picked[way] = max(trials, key=lambda run: run["accuracy"])["learning_rate"] if trials else rates[0]
        runs += trials + [run_of(way, picked[way], seed, args) for seed in SEEDS]
    print(f"Before fine-tuning {before['accuracy']:.1f} % of the sentences are right.")
    print(f"{'':8}{'rate':>8}{'right of each seed':>30}{'mean':>8}{'s/step':>8}{'checkpoint':>14}")
    for way, rate in picked.items():
        own = [run for run in runs if run["way"] == way and run["seed"] in SEEDS]
        scores = [run["accuracy"] for run in own]
        seconds, size = (statistics.median(run[name] for run in own) for name in ("seconds_per_step", "checkpoint_bytes"))
        each = " ".join(f"{score:.1f}" for score in scores)
        print(f"{way:8}{rate:8g}{each:>30}{statistics.mean(scores):8.2f}{seconds:8.3f}{size:14,}")
    results = {"steps": args.steps, "examples": examples, "before": before, "picked": picked, "runs": runs}
    run_record.write(args.output, results)


if __name__ == "__main__":
    main()
