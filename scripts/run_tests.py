"""Runs the parts of the test suite that are asked for, and prints what each cost; `scripts/test.sh` makes the environment first."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts import run  # noqa: E402 - it lies beside this file
from parts.newest import newest_part  # noqa: E402
from parts.soak import soak_parts  # noqa: E402
from parts.table import Part, render  # noqa: E402

CI_SECONDS = 65 * 60  # after which --ci begins no slow test any more: it takes half of that on two quick cores

USAGE = """bash scripts/test.sh [PART] [-- pytest arguments]

  (none)            lint, a smoke run of the main path, and the quick tests
  --ci              the same; the wheel; a quick subset on the newest JAX; and a quarter of the slow tests, by the number of commits
  --slow            the slow tests
  --slow-part N     quarter N of the slow tests, 0 to 3
  --hardware        programs for TPUs and GPUs, compiled without the hardware
  --all             quick, slow and hardware
  --soak [ROUNDS]   kills and continues runs, each round with other seeds (10 rounds)
  --wheel           builds the wheel and uses it in an empty folder
  --matrix ...      the quick tests in an environment for every Python and the oldest and newest packages
  --mutate ...      tells which small changes of the code the quick tests do not notice
  --record          write what each test took to tests/durations.json, by which tests are quick or slow and slow ones in a quarter
"""


def main() -> int:
    """0 where every part that ran is as it should be."""
    arguments, extra = _split(sys.argv[1:])
    options = _options(arguments)
    parts: list[Part] = []
    for part in _parts(options, extra):
        parts.append(part)
    if options.record:
        run.record_durations(parts, whole=options.all)
    print(f"\n{render(parts)}", flush=True)
    return int(not all(part.ok for part in parts))


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our own arguments, pytest's)."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False)
    one = parser.add_mutually_exclusive_group()
    for flag in ("--ci", "--slow", "--hardware", "--all", "--wheel"):
        one.add_argument(flag, action="store_true")
    one.add_argument("--slow-part", type=int, choices=range(4), default=None)
    one.add_argument("--soak", type=int, nargs="?", const=10, default=None)
    parser.add_argument("--record", action="store_true")
    return parser.parse_args(arguments)


def _parts(options: argparse.Namespace, extra: list[str]):
    """Runs one part after the other; a part that fails does not keep the others from running."""
    began = time.time()
    if options.soak is not None:
        yield from soak_parts(options.soak, extra)
    elif options.slow_part is not None or options.slow:
        yield run.slow_part(options.slow_part, extra)
    elif options.hardware:
        yield run.pytest_part("hardware", "hardware", extra)
    elif options.wheel:
        yield wheel()
    else:
        yield from quick(extra)
        if options.ci:
            yield wheel()
            yield newest_part(extra)
            yield run.slow_part(turn(), [*extra, f"--begin-by={began + CI_SECONDS:.0f}"])
        if options.all:
            yield run.slow_part(None, extra)
            yield run.pytest_part("hardware", "hardware", extra)


def quick(extra: list[str]):
    """Lint, smoke run and quick tests."""
    ruff = [sys.executable, "-m", "ruff"]
    types = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    yield run.command_part("lint", [*ruff, "check", "."], [*ruff, "format", "--check", "."], types)
    yield run.command_part("smoke run", [sys.executable, "scripts/smoke.py"])
    yield run.pytest_part("quick", run.QUICK, extra)


def wheel() -> Part:
    """Builds the wheel and uses it."""
    return run.command_part("wheel", [sys.executable, "scripts/wheel_test.py"])


def turn() -> int:
    """The quarter of the slow tests that is this commit's turn, by the number of commits: a commit always gets the same."""
    count = ["git", "rev-list", "--count", "HEAD"]
    return int(subprocess.run(count, cwd=run.ROOT, check=True, capture_output=True, text=True).stdout) % 4


if __name__ == "__main__":
    os.chdir(run.ROOT)
    sys.exit(main())
