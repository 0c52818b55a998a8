"""Distillation on the tiny recipe: a dense student beside the same model trained alone for the same number of steps.

    python benchmarks/distillation.py --workdir runs/distillation                        # about 12 minutes on 2 cores
    python benchmarks/distillation.py --workdir runs/distillation --teacher runs/tiny    # with a teacher that is there

Pre-trains the teacher (configs/tiny.py) unless one is given, then the dense model of configs/t5_tiny.py alone, and as the teacher's
student (configs/distill_tiny.py): with the teacher's weights and probabilities, and with each of the two by itself. Prints the
held-out cross-entropy of each, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import run_record

ROOT = Path(__file__).parents[1]


def train(command: str, recipe: str, workdir: Path, *flags: str) -> float:
    """Runs a command to its end, going on where it was stopped; the seconds it took."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "flax_switch.cli", command, "--config", f"configs/{recipe}.py", "--workdir", str(workdir), *flags]
    if subprocess.run(line, cwd=ROOT).returncode:
        sys.exit(f"{command} in {workdir} did not finish.")
    return time.perf_counter() - start


def heldout(workdir: Path) -> dict:
    """The last evaluation of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    return {name: last[name] for name in ("step", "cross_entropy", "text_cross_entropy")}


def main() -> None:
    """Trains, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="a run of configs/tiny.py")
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=300, help="of every student, and of the model alone")
    parser.add_argument("--students", nargs="*", default=["both", "weights", "probabilities"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/distillation.json")
    args = parser.parse_args()
    workdir = args.workdir.resolve()
    teacher, seconds = args.teacher, {}
    if teacher is None:
        teacher = workdir / "teacher"
        seconds["teacher"] = train("pretrain", "tiny", teacher, f"--config.train.steps={args.teacher_steps}")
    teacher = teacher.resolve()
    steps = [f"--config.train.steps={args.steps}", f"--config.train.eval_every={args.steps}", "--config.train.sample_spans=0"]
    seconds["alone"] = train("pretrain", "t5_tiny", workdir / "alone", *steps)
    settings = {
        "both": [],
        "weights": ["--config.distillation.teacher_weight=0.0"],
        "probabilities": ["--config.distillation.copy_weights=false"],
    }
    for name in args.students:
        flags = ["--teacher", str(teacher), *steps, *settings[name]]
        seconds[name] = train("distill", "distill_tiny", workdir / name, *flags)
    rows = {"teacher": heldout(teacher)} | {name: heldout(workdir / name) for name in ("alone", *args.students)}
    print("\nheld-out, nats per token    steps   all targets   text")
    for name, row in rows.items():
        print(
            f"{name:26}{row['step']:7}{row['cross_entropy']:14.3f}{row['text_cross_entropy']:7.3f}{seconds.get(name, 0.0):9.0f} s"
        )
    run_record.write(args.output, dict(steps=args.steps, rows=rows, seconds=seconds))


if __name__ == "__main__":
    main()
