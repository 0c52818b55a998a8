"""Whatever is read may be damaged: a case ends in a result or in one sentence, within ten seconds, and within bounds of memory.

A case is named by its reader and a number, such as huggingface-config/17, and is the same every time. FUZZ_CASES=name,name repeats
some; FUZZ_SEED=N draws others than the fixed ones (a failure names its cases), FUZZ_COUNT=N so many.
"""

import dataclasses
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.readers.commands import command_line
from tests.fuzz.worker import SECONDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, devices and limits of memory are Unix's")
ROOT = Path(__file__).parents[2]
STARTUP = 120.0  # seconds that a worker may take to import everything
AT_ONCE = 200  # cases of a worker
MEMORY = 4 << 30  # bytes that a worker may hold


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a case ended: "fine", "refused", "raw" (an error that is no sentence), "hang", "memory" or "died"."""

    case: str
    outcome: str
    seconds: float = 0.0
    text: str = ""


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The undamaged inputs, a folder for each reader."""
    folder = tmp_path_factory.mktemp("good")
    made = set()

    def of(names):
        for name in names:
            if name not in made:
                (folder / name).mkdir()
                READERS[name].make(folder / name)
                made.add(name)
        return folder

    return of


def run_cases(cases: list[str], good: Path) -> Iterator[Ended]:
    """Runs cases in workers; one that hangs or dies costs its case alone, and the next worker goes on behind it."""
    cases = list(cases)
    while cases:
        batch = cases[:AT_ONCE]
        done = 0
        for ended in _run_batch(batch, good):
            done += 1
            if ended.outcome not in ("fine", "refused"):
                print(f"--- {ended.case}: {ended.outcome} after {ended.seconds:.1f} s\n{ended.text}", flush=True)
            yield ended
        cases = cases[done:]


def _run_batch(batch: list[str], good: Path) -> Iterator[Ended]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.worker", str(good)], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        reading = threading.Thread(target=lambda: [*map(lines.put, worker.stdout), lines.put(None)], daemon=True)
        reading.start()
        worker.stdin.write("\n".join(batch) + "\n")
        worker.stdin.close()
        try:
            yield from _watched(worker, lines, errors)
        finally:
            worker.kill()
            worker.wait()
            reading.join()
            worker.stdout.close()


def _watched(worker: subprocess.Popen, lines: queue.Queue, errors: IO[str]) -> Iterator[Ended]:
    """Yields how cases ended, as the worker says or as is seen from without."""
    case, ready, deadline = "", False, time.monotonic() + STARTUP

    def without(outcome: str) -> Ended:
        errors.seek(0)
        last = "".join(errors.readlines()[-60:])
        assert ready, f"the worker does not start:\n{last}"
        return Ended(case, outcome, SECONDS, last)

    while True:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            if memory_of(worker.pid) > MEMORY:
                yield without("memory")
                return
            if time.monotonic() > deadline:
                yield without("hang")
                return
            continue
        if line is None:
            if case or not ready:
                yield without(f"died ({worker.wait()})")
            return
        told, ready, deadline = json.loads(line), True, time.monotonic() + patience()
        if told["state"] == "begins":
            case = told["case"]
        elif told["state"] == "ends":
            yield Ended(case, "hang" if told["seconds"] > SECONDS else told["outcome"], told["seconds"], told["text"])
            case = ""


def patience() -> float:
    """Returns for how long a case may be silent: longer where others keep the machine busy."""
    return (SECONDS + 2) * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def memory_of(process: int) -> int:
    """Returns the bytes that a process holds in memory; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def check_cases(cases: list[str], good: Path) -> list[Ended]:
    """Runs cases; fails with every one that ends badly. One that took too long has a second try: what it imports is there then."""
    ended = list(run_cases(cases, good))
    again = {one.case: one for one in run_cases([one.case for one in ended if one.outcome == "hang"], good)}
    ended = [again.get(one.case, one) for one in ended]
    bad = [one for one in ended if one.outcome not in ("fine", "refused")]
    counts = {outcome: sum(one.outcome == outcome for one in ended) for outcome in sorted({one.outcome for one in ended})}
    print(f"{len(ended)} cases: {counts}; the slowest: {max(ended, key=lambda one: one.seconds, default=None)}")
    assert len(ended) == len(cases)
    assert not bad, "repeat them: FUZZ_CASES=" + ",".join(one.case for one in bad)
    return ended


def drawn(count: int, seed: int, names: list[str]) -> list[str]:
    """Returns the names of `count` cases, spread over the readers."""
    first = random.Random(seed).randrange(1, 10**9)
    return [f"{names[i % len(names)]}/{first + i}" for i in range(count)]


SLOW_TO_MAKE = ("run", "run-metadata", "t5x", "report", "torch-bin", "torch-bin-old")


def test_a_few_cases_of_most_readers(good):
    if "FUZZ_CASES" in os.environ:
        cases = os.environ["FUZZ_CASES"].split(",")
        check_cases(cases, good({case.rpartition("/")[0] for case in cases}))
        return
    names = [name for name in READERS if name not in SLOW_TO_MAKE]
    check_cases(drawn(100, 0, names), good(names))


# What is wrong with these, or which fields are asked for, is drawn when they are read.
DRAWN = ("overrides", "gin", "controls", "fields", "sizes-and-topologies", *(name for name in READERS if name.startswith("task-")))


@pytest.mark.slow
def test_undamaged_inputs_are_read(good):
    ended = check_cases([f"{name}/0" for name in READERS if READERS[name].damaged], good(READERS))
    refused = [one for one in ended if one.outcome != "fine" and one.case.rpartition("/")[0] not in DRAWN]
    assert not refused, refused


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["fixed", "fresh"])
def test_many_cases_of_every_reader(good, seeds):
    fresh = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(2, 10**6)
    seed = 1 if seeds == "fixed" else fresh
    print(f"FUZZ_SEED={seed}")
    check_cases(drawn(int(os.environ.get("FUZZ_COUNT", "1000")), seed, list(READERS)), good(READERS))


@pytest.mark.slow
def test_command_lines_in_processes_of_their_own(good, tmp_path):
    place = shutil.copytree(good(["command-lines"]) / "command-lines", tmp_path / "place")
    for number in range(30):
        arguments = [text.replace("\0", "") for text in command_line(random.Random(f"process/{number}"), place)]
        command = [sys.executable, "-m", "flax_switch", *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=10 * patience())
        assert ended.returncode in (1, 2), (arguments, ended.stderr)
        assert ended.stderr.strip() and "Traceback" not in ended.stderr, (arguments, ended.stderr)
