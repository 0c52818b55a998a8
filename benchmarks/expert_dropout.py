"""Does dropout inside the experts help fine-tuning (2101.03961, table 4)? A sparse model, few examples, five settings, three seeds.

    flax-switch pretrain --config tiny --workdir runs/tiny
    python benchmarks/expert_dropout.py --sparse runs/tiny --workdir runs/expert_dropout    # goes on where it was stopped

The task is that of benchmarks/finetuning_peers.py: which of six packages' documentation a sentence is from, of 1,000 held-out
sentences. It is learned from --examples of them alone, over and over, so that there is something for dropout to prevent.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import run_record
from finetuning_peers import labels_of, recipe_of, write_tasks

from flax_switch.host.compile_cache import use_compile_cache
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.finetune import finetune

# Dropout everywhere else, and inside the experts.
SETTINGS = {
    "none": (0.0, 0.0),
    "0.1": (0.1, 0.1),
    "0.2": (0.2, 0.2),
    "0.3": (0.3, 0.3),
    "0.1, in experts 0.4": (0.1, 0.4),
}


def run_of(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes with a setting, unless that has been done, and returns what was measured at the end."""
    workdir = args.workdir / f"{list(SETTINGS).index(name)}_{args.examples}_{args.steps}_{args.rate:g}_{seed}"
    kept = workdir / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    everywhere, in_experts = SETTINGS[name]
    data = args.workdir / "data" / "classification"
    model = dict(dropout_rate=everywhere, expert_dropout_rate=in_experts, head="classification", labels=labels_of(data))
    recipe = recipe_of("classification", data / f"{args.examples}.jsonl", model, args.rate, seed, args.steps)
    finetune(recipe, workdir, init=str(args.sparse))
    lines = read_metrics(workdir)
    last = next(line for line in reversed(lines) if line["kind"] == "eval")
    trained = next(line for line in reversed(lines) if line["kind"] == "train")
    measured = dict(accuracy=last["accuracy"], cross_entropy=last["cross_entropy"], training_cross_entropy=trained["cross_entropy"])
    kept.write_text(json.dumps({"setting": name, "seed": seed, **measured}) + "\n")
    print(f"dropout {name}, seed {seed}: {measured}", flush=True)
    return json.loads(kept.read_text())


def main() -> None:
    """Runs all, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "expert_dropout.json")
    args = parser.parse_args()
    use_compile_cache()  # the seeds of a setting run one program
    data = args.workdir / "data"
    write_tasks(data)
    rows = (data / "classification" / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "classification" / f"{args.examples}.jsonl").write_text("".join(rows[: args.examples]))
    found = {name: [run_of(name, seed, args) for seed in args.seeds] for name in SETTINGS}
    print("| dropout | accuracy, mean (each) | cross-entropy, held out | in training |\n|---|---|---|---|")
    for name, runs in found.items():
        accuracy, *losses = ([run[key] for run in runs] for key in ("accuracy", "cross_entropy", "training_cross_entropy"))
        each = ", ".join(f"{x:.1f}" for x in accuracy)
        print(f"| {name} | {statistics.mean(accuracy):.1f} ({each}) | {' | '.join(f'{statistics.mean(x):.3f}' for x in losses)} |")
    run_record.write(args.output, {"examples": args.examples, "steps": args.steps, "learning_rate": args.rate, "runs": found})


if __name__ == "__main__":
    main()
