"""How long a recipe takes to a fixed level on held-out text: docs/pretraining.md keeps the table.

    python benchmarks/speedrun.py --workdir runs/speedrun [--config tiny]

The level: the encoder is worth 2 nats a token for infilling, and 15 % of whole gaps are right. Training stops at the first
evaluation, one every 50 steps, that finds both. Seconds are of compilation and training; evaluation, the corpus and
the vocabulary are left out. Printed is a row of the table: date, commit, CPU, steps, seconds, CPU seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import subprocess
import time
from pathlib import Path
from typing import Any

import run_record

from flax_switch.config.recipes import load_recipe
from flax_switch.host.memory import keep_freed_memory
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.checkpoint import claim_workdir
from flax_switch.training.evaluate import Evaluator
from flax_switch.training.loop import train
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_eval_step

LEVEL = {"encoder_gain/infilling": 2.0, "masked_spans_exact": 0.15}


@dataclasses.dataclass(frozen=True)
class UntilLevel(Evaluator):
    """Ends training at the level. `spent` adds up what evaluation took: [seconds, CPU seconds]."""

    spent: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])

    def __call__(self, params: Any) -> dict[str, Any]:
        """Evaluates, and counts the time."""
        began = time.perf_counter(), time.process_time()
        evaluation = super().__call__(params)
        self.spent[0] += time.perf_counter() - began[0]
        self.spent[1] += time.process_time() - began[1]
        return evaluation

    def conclude(self, step: int, params: Any, evaluation: dict[str, Any] | None) -> Any:
        """Returns why training ends, or None."""
        return "the level is reached" if evaluation and reached(evaluation) else None


def reached(evaluation: dict[str, Any]) -> bool:
    """Returns whether an evaluation is at the level."""
    return all(evaluation.get(name, 0.0) >= least for name, least in LEVEL.items())


def main() -> None:
    """Trains to the level and prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings to try")
    args = parser.parse_args()
    from flax_switch import data

    keep_freed_memory()
    config = load_recipe(args.config, [*args.set, "train.eval_every=50"])
    workdir = claim_workdir(args.workdir, config)
    prepared = data.prepare(config.data, workdir=workdir)
    began, cpu_began = time.perf_counter(), time.process_time()
    run = build_run(config, create_mesh(config.mesh))
    evaluator = Evaluator.of(run, prepared, compile_eval_step(run))
    until = UntilLevel(**{field.name: getattr(evaluator, field.name) for field in dataclasses.fields(Evaluator)})
    result = train(run, prepared, workdir, lambda: until, init_state)
    seconds, cpu = time.perf_counter() - began - until.spent[0], time.process_time() - cpu_began - until.spent[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "no commit"
    level = "" if result.evaluation and reached(result.evaluation) else " (level not reached)"
    machine = run_record.processor()
    cores = f"{machine['cores']} cores of {machine['name']}"
    print(f"| {datetime.date.today()} | {commit} | {cores} | {result.step}{level} | {seconds:.0f} | {cpu:.0f} | what changed |")


if __name__ == "__main__":
    main()
