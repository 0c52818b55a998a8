"""Runs the parts of the suite, each in a process of its own, and gathers what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from parts.plugin import DURATIONS, function_of
from parts.table import Part

ROOT = Path(__file__).resolve().parents[2]
WORKERS = os.environ.get("PYTEST_WORKERS", "2")
QUICK = "not slow and not hardware"
# What tells most about a JAX that is newer than the one which the whole of quick meets, in a few minutes and without PyTorch.
NEWEST_TESTS = [
    "tests/ops", "tests/nn", "tests/plan", "tests/training/test_step.py", "tests/training/test_adafactor.py",
    "tests/training/test_expert_parallel.py", "tests/config/test_config.py",
]  # fmt: skip
NO_TESTS_COLLECTED = 5
NOTABLE = 1.0  # seconds of a test, all its cases together, from which on they are on record


def say(text: str) -> None:
    """Prints a heading."""
    print(f"\n\033[1m== {text}\033[0m", flush=True)


def command_part(name: str, *commands: list[str]) -> Part:
    """A part that is a few commands, all of which must succeed; the first that does not ends it."""
    say(name)
    began = time.monotonic()
    ok = all(_status(command) == 0 for command in commands)
    return Part(name, (time.monotonic() - began) / 60, ok)


def _status(command: list[str]) -> int:
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def pytest_part(name: str, marks: str, extra: list[str], *, python: str = sys.executable, dist: str = "loadfile") -> Part:
    """A part that is a run of pytest over the tests with these marks."""
    say(name)
    began = time.monotonic()
    status, outcomes = _pytest(python, ["-n", WORKERS, "--dist", dist, "-m", marks, *extra])
    part = Part(name, ok=status in (0, NO_TESTS_COLLECTED))
    part.outcomes = Counter(test["outcome"] for test in outcomes.values())
    part.reasons = Counter(test["reason"] for test in outcomes.values() if test["outcome"] == "skipped")
    part.failed = [name for name, test in outcomes.items() if test["outcome"] == "failed"]
    part.seconds = {name: test["seconds"] for name, test in outcomes.items()}
    part.note = "no test was chosen" if status == NO_TESTS_COLLECTED else ""
    part.minutes = (time.monotonic() - began) / 60
    return part


def slow_part(quarter: int | None, extra: list[str]) -> Part:
    """The slow tests, or a quarter of them; one that fails is run once more alone, and is flaky if it passes then."""
    name = "slow" if quarter is None else f"slow, quarter {quarter}"
    choice = [] if quarter is None else [f"--quarter={quarter}"]
    part = pytest_part(name, "slow and not hardware", [*choice, *extra], dist="worksteal")
    began, failed = time.monotonic(), part.failed
    for test in failed:
        say(f"Once more, alone: {test}")
        if _pytest(sys.executable, ["-m", "not hardware", test])[0] == 0:
            part.flaky.append(test)
    part.failed = [test for test in failed if test not in part.flaky]
    part.outcomes["failed"] = len(part.failed)
    part.ok = part.ok or (bool(failed) and not part.failed)
    part.minutes += (time.monotonic() - began) / 60
    return part


def record_durations(parts: list[Part], whole: bool, file: Path = DURATIONS) -> None:
    """Writes how many cases each test function has and how long one takes.

    whole: that all tests ran; else what was on record of others stays.
    """
    seconds = {test: took for part in parts for test, took in part.seconds.items()}
    took: dict[str, list[float]] = {}
    for test, of_test in seconds.items():
        took.setdefault(function_of(test), []).append(of_test)
    known = {} if whole or not file.is_file() else json.loads(file.read_text("utf-8"))
    known |= {name: [len(cases), round(sum(cases) / len(cases), 2)] for name, cases in took.items()}
    worth = {name: known[name] for name in sorted(known) if known[name][0] * known[name][1] >= NOTABLE}
    file.write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(one)}" for name, one in worth.items()) + "\n}\n", "utf-8")


def _pytest(python: str, arguments: list[str]) -> tuple[int, dict[str, dict]]:
    """pytest's status, and every test's outcome."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        paths = [str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [python, "-m", "pytest", "-p", "parts.plugin", f"--outcomes={file}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        return status, json.loads(file.read_text("utf-8")) if file.is_file() else {}
