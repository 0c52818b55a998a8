"""Runs tests against mutants, each in a copy of the tree, and keeps what came of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from mutation import coverage_map, warm
from mutation.coverage_map import CoverageMap
from mutation.plan import Batch, batches
from mutation.sites import Mutant

TOOL_FAILED = 70  # also what `warm.start` ends with after an exception


@dataclass
class Result:
    """What became of one mutant."""

    name: str
    file: str
    line: int
    operator: str
    was: str
    becomes: str
    outcome: str = "survived"  # or "killed", "equivalent"
    by: str = ""  # the test that failed; "time limit", "crash"; or why it is equivalent
    tests: int = 0  # that ran
    covered: int = 0  # tests that run its line
    seconds: float = 0.0

    @classmethod
    def of(cls, mutant: Mutant, **fields) -> Result:
        """A result that names its mutant."""
        site = mutant.site
        return cls(mutant.name, site.file, site.line, site.operator, mutant.was, mutant.becomes, **fields)


class Choice:
    """A pytest plugin that runs the named tests in the order given, and tells which failed first and how many ran."""

    def __init__(self, tree: Path, tests: dict[str, list[str]], told: Path):
        order = [test for of_module in tests.values() for test in of_module]
        self.tree, self.told, self.place = tree, told, {test: i for i, test in enumerate(order)}
        self.ran, self.failed = 0, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])
        package = sys.modules.get("flax_switch")
        if package is not None and not str(package.__file__).startswith(str(self.tree)):
            raise SystemExit(f"flax_switch was imported from {package.__file__}, not from {self.tree}")

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self):
        self.told.write_text(json.dumps({"ran": self.ran, "failed": self.failed}))


def run_batch(tree: Path, batch: Batch, told: Path) -> int:
    """Runs a batch in this process, which is a child of the warm one."""
    told.unlink(missing_ok=True)
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-W", coverage_map.ALREADY_IMPORTED]
    return coverage_map.run_pytest([*options, *batch.tests], Choice(tree, batch.tests, told))


@dataclass
class Task:
    """A child's work and what to do with its status; `then` returns the task that follows in the same tree, or None."""

    work: Callable[[Path, Path], int]  # given the tree and the log
    limit: float
    then: Callable[[int, Path, float], Task | None]


@dataclass
class Pool:
    """Copies of the tree, in each of which one child runs at a time; they go when this process ends."""

    root: Path
    folder: Path
    jobs: int
    trees: list[Path] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = tempfile.TemporaryDirectory(prefix="trees-", dir=self.folder)
        for number in range(self.jobs):
            tree = Path(self.temporary.name) / str(number)
            for file in tracked_files(self.root):
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / file, tree / file)
            self.trees.append(tree)

    def run(self, tasks: Iterable[Task], until: float) -> bool:
        """Runs the tasks, as many at a time as there are trees; False where `until`, a time, came first."""
        waiting, running = iter(tasks), {}
        with warm.killed_at_the_end() as children:
            while True:
                for tree in self.trees:
                    if tree not in running and time.monotonic() < until and (task := next(waiting, None)):
                        running[tree] = self._start(task, tree, children)
                if not running:
                    return next(waiting, None) is None and time.monotonic() < until
                for tree, (task, child, began) in list(running.items()):
                    self._poll(running, tree, task, child, began, children, until)
                time.sleep(0.02)

    def _start(self, task: Task, tree: Path, children: set[int]) -> tuple[Task, int, float]:
        log = self.log_of(tree)
        child = warm.start(lambda: task.work(tree, log), tree, log)
        children.add(child)
        return task, child, time.monotonic()

    def _poll(self, running, tree, task, child, began, children, until) -> None:
        status = warm.ended(child, began + task.limit)
        if status is None:
            return
        children.discard(child)
        del running[tree]
        following = task.then(status, tree, time.monotonic() - began)
        if following is not None:
            running[tree] = self._start(following, tree, children)

    @staticmethod
    def log_of(tree: Path) -> Path:
        """Where the child in the tree writes what it prints."""
        return tree.parent / f"{tree.name}.log"


def tracked_files(root: Path) -> list[str]:
    """Every file of the checkout that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (root / name).is_file()]


class Judge:
    """Decides which tests a mutant meets, and believes a test that fails only once it has passed where nothing is changed."""

    def __init__(self, coverage: CoverageMap, hints: dict[str, str], most_seconds: float, results: Results):
        self.coverage, self.hints, self.most_seconds = coverage, hints, most_seconds
        self.trusted = {result.by for result in results.of.values() if result.outcome == "killed"}

    def batches(self, mutant: Mutant) -> list[Batch]:
        """What to run for the mutant."""
        return batches(mutant.site, self.coverage, self.hints.get(mutant.name), self.most_seconds)

    def believes(self, test: str) -> bool:
        """Whether a failure of the test, or an end that is no test's, needs no control."""
        return test in self.trusted or not test.startswith("tests/")

    def control(self, test: str, failed: Batch) -> Batch:
        """The test alone; where a module could not be imported, a test of each that was imported with it."""
        modules = {test.split("::")[0]: [test]} if "::" in test else failed.tests
        chosen = {module: [min(tests, key=lambda t: self.coverage.seconds.get(t, 60.0))] for module, tests in modules.items()}
        return Batch(chosen, sum(self.coverage.seconds.get(t, 60.0) for tests in chosen.values() for t in tests))

    def settle(self, test: str, *, passed: bool) -> None:
        """Takes what the control of a test gave."""
        if passed:
            self.trusted.add(test)
        else:
            print(f"  {test} fails on the unchanged tree as well, and is left out", flush=True)
            self.coverage.distrust(test)


def mutant_task(mutant: Mutant, todo: list[Batch], result: Result, done: Callable[[Result], None], judge: Judge) -> Task:
    """The task that runs a mutant's batches up to the first that fails."""
    batch, following = todo[0], todo[1:]

    def work(tree: Path, log: Path) -> int:
        (tree / mutant.site.file).write_text(mutant.after, "utf-8")
        return run_batch(tree, batch, log.with_suffix(".told"))

    def then(status: int, tree: Path, seconds: float) -> Task | None:
        (tree / mutant.site.file).write_text(mutant.before, "utf-8")
        verdict = _verdict(status, Pool.log_of(tree))
        result.seconds += seconds
        result.tests += verdict["ran"]
        if verdict["killed"]:
            result.outcome, result.by = "killed", verdict["by"]
            if not judge.believes(result.by):
                return control_task(mutant, result, batch, done, judge)
        elif following:
            return mutant_task(mutant, following, result, done, judge)
        done(result)
        return None

    return Task(work, batch.limit, then)


def control_task(mutant: Mutant, result: Result, failed: Batch, done: Callable[[Result], None], judge: Judge) -> Task:
    """The task that runs the test which killed a mutant on the unchanged tree; if it fails there too, the mutant starts again."""
    batch = judge.control(result.by, failed)

    def then(status: int, tree: Path, seconds: float) -> Task | None:
        verdict = _verdict(status, Pool.log_of(tree))
        judge.settle(result.by, passed=not verdict["killed"] and verdict["ran"] > 0)
        result.seconds += seconds
        if result.by not in judge.trusted:
            result.outcome, result.by, result.tests = "survived", "", 0
            todo = judge.batches(mutant)
            if todo:
                return mutant_task(mutant, todo, result, done, judge)
        done(result)
        return None

    return Task(lambda tree, log: run_batch(tree, batch, log.with_suffix(".told")), batch.limit, then)


def _verdict(status: int, log: Path) -> dict:
    told = log.with_suffix(".told")
    found = json.loads(told.read_text()) if told.is_file() else {"ran": 0, "failed": ""}
    if status < 0:
        return {"killed": True, "by": "time limit" if status == -9 else f"signal {-status}", "ran": found["ran"]}
    if status == TOOL_FAILED or "flax_switch was imported from" in found["failed"]:
        raise SystemExit(f"The run itself failed; see {log}:\n{log.read_text(errors='replace')[-2000:]}")
    if not found["failed"] and status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return {"killed": False, "by": "", "ran": found["ran"]}
    return {"killed": True, "by": found["failed"] or "import", "ran": found["ran"]}


class Results:
    """The results of one seed on one tree, kept as they come."""

    def __init__(self, folder: Path, tree_hash: str, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / f"{tree_hash}-seed{seed}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.of = {r["name"]: Result(**r) for r in map(json.loads, lines)}

    def add(self, result: Result) -> None:
        """Keeps a result."""
        self.of[result.name] = result
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def hints(self) -> dict[str, str]:
        """For mutants that some test killed on other trees, that test: likely to kill it again."""
        found = {}
        for file in sorted(self.folder.glob("*.jsonl"), key=lambda f: f.stat().st_mtime):
            for record in map(json.loads, file.read_text().splitlines()):
                if "::" in record["by"] and record["outcome"] == "killed":
                    found[record["name"]] = record["by"]
        return found
