"""Runs are killed and continued again and again, each round with other seeds; what rounds have passed is kept in .soak."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from parts.run import ROOT, pytest_part
from parts.table import Part

TESTS = ["tests/training/test_resume.py", "tests/parallel/test_processes.py", "tests/training/test_object_storage.py"]
TESTS += ["tests/data/test_data_pipeline.py", "tests/serve/test_soak.py"]
KEPT = ROOT / ".soak" / "rounds.jsonl"


def soak_parts(rounds: int, extra: list[str]) -> list[Part]:
    """The rounds that have not passed yet, of rounds 1 to `rounds`; a round that failed is run again."""
    passed = {r["round"] for r in _kept() if r["ok"]}
    return [_round(number, extra) for number in range(1, rounds + 1) if number not in passed] or [
        Part("soak", note=f"all of {rounds} rounds have passed before; remove {KEPT.relative_to(ROOT)} to run them again")
    ]


def _round(number: int, extra: list[str]) -> Part:
    os.environ["SOAK_ROUND"] = str(number)
    extra = extra if any(not argument.startswith("-") for argument in extra) else [*TESTS, *extra]
    part = pytest_part(f"soak, round {number}", "not hardware", [f"--hypothesis-seed={number}", *extra], dist="worksteal")
    KEPT.parent.mkdir(exist_ok=True)
    with Path(KEPT).open("a") as file:
        print(json.dumps({"round": number, "ok": part.ok, "failed": part.failed, "at": round(time.time())}), file=file)
    return part


def _kept() -> list[dict]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.is_file() else []
