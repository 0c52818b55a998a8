"""Which test runs which line: measured for each test module in a process of its own, and kept while the files it ran stay so."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import pytest

IMPORT = "import"  # the context of what runs while the module is imported
ALREADY_IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"  # by the warm process


class Recorder:
    """A pytest plugin that tells coverage whose lines come next, and keeps how long every test took.

    What a fixture of a wider scope runs counts for every test that asks for the fixture, not only for the first.
    """

    def __init__(self, coverage):
        self.coverage, self.context = coverage, IMPORT
        self.seconds: dict[str, float] = defaultdict(float)
        self.outcomes: dict[str, str] = {}
        self.users: dict[str, list[str]] = defaultdict(list)

    def _switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    def pytest_collection_finish(self, session):
        for item in session.items:
            for name, definitions in item._fixtureinfo.name2fixturedefs.items():
                self.users[f"fixture:{definitions[-1].baseid}:{name}"].append(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = self._switch(item.nodeid)
        result = yield
        self._switch(before)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        before = self._switch(f"fixture:{fixturedef.baseid}:{fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed or (report.skipped and report.nodeid not in self.outcomes):
            self.outcomes[report.nodeid] = report.outcome


def run_pytest(arguments: list[str], plugin) -> int:
    """Runs pytest; what it finds left behind after the last test is put down to no test, and so ignored."""
    try:
        return int(pytest.main(arguments, plugins=[plugin]))
    except pytest.PytestUnraisableExceptionWarning:
        return int(pytest.ExitCode.OK)


def measure(tree: Path, module: str, output: Path) -> int:
    """Runs a test module's quick tests under coverage and writes which of them ran which lines."""
    import coverage

    cov = coverage.Coverage(data_file=None, config_file=False, include=[str(tree / "flax_switch" / "*")], context=None)
    recorder = Recorder(cov)
    cov.start()
    cov.switch_context(IMPORT)
    status = run_pytest(["-q", "-p", "no:cacheprovider", "-W", ALREADY_IMPORTED, module], recorder)
    cov.stop()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(status)
    output.write_text(json.dumps(_content(tree, module, cov.get_data(), recorder)))
    return 0


def _content(tree: Path, module: str, data, recorder: Recorder) -> dict:
    tests = list(recorder.seconds)
    number = {test: i for i, test in enumerate(tests)}
    lines, sets = {}, {}
    for file in sorted(data.measured_files()):
        name = str(Path(file).relative_to(tree))
        lines[name] = {}
        for line, contexts in data.contexts_by_lineno(file).items():
            users = {u for c in contexts for u in (recorder.users.get(c, ()) if c.startswith("fixture:") else [c])}
            key = tuple(sorted(number[u] for u in users if u in number)) + ((-1,) if IMPORT in users else ())
            if key:
                lines[name][line] = sets.setdefault(key, len(sets))
    return {
        "module": module,
        "stamp": stamp(tree, module),
        "files": {name: digest(tree / name) for name in lines},
        "tests": [[test, round(recorder.seconds[test], 3)] for test in tests],
        "not_passed": recorder.outcomes,
        "sets": list(sets),
        "lines": lines,
    }


def digest(path: Path) -> str:
    """A short hash of a file's content, "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def stamp(tree: Path, module: str) -> str:
    """A hash of the test module and of the helpers beside it."""
    path = tree / module
    beside = [p for p in sorted(path.parent.glob("*.py")) if not p.name.startswith("test_")]
    return hashlib.sha256("".join(digest(file) for file in (path, *beside)).encode()).hexdigest()[:16]


def load(file: Path, tree: Path) -> dict | None:
    """A module's map, or None where it is missing, or made from other files than the tree holds now."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    current = content["stamp"] == stamp(tree, content["module"])
    return content if current and all(digest(tree / name) == hash_ for name, hash_ in content["files"].items()) else None


class CoverageMap:
    """The maps of all test modules together."""

    def __init__(self, modules: list[dict]):
        self.modules = {content["module"]: content for content in modules}
        self.seconds = {test: seconds for content in modules for test, seconds in content["tests"]}
        self.unreliable = {test for content in modules for test in content["not_passed"]}

    def distrust(self, test: str) -> None:
        """Leaves a test out, or a whole module, since it fails without any change."""
        self.unreliable |= {test} if "::" in test else {name for name, _ in self.modules[test]["tests"]}

    def tests_of_module(self, module: str) -> list[str]:
        """Every test of the module that passed."""
        return [test for test, _ in self.modules[module]["tests"] if test not in self.unreliable]

    def covering(self, file: str, lines: range) -> dict[str, list[str]]:
        """For every test module, its tests that run any of the lines while they run themselves."""
        found = {}
        for module, content in self.modules.items():
            of_file = content["lines"].get(file, {})
            numbers = {i for line in lines if str(line) in of_file for i in content["sets"][of_file[str(line)]]}
            tests = [content["tests"][i][0] for i in sorted(numbers) if i >= 0]
            tests = [test for test in tests if test not in self.unreliable]
            if tests:
                found[module] = tests
        return found

    def importing(self, file: str, lines: range | None = None) -> list[str]:
        """The test modules that import the file at all; or those during whose import one of the lines ran."""
        found = {module: content["lines"][file] for module, content in self.modules.items() if file in content["lines"]}
        if lines is None:
            return list(found)
        return [
            module
            for module, of_file in found.items()
            if any(-1 in self.modules[module]["sets"][of_file[str(line)]] for line in lines if str(line) in of_file)
        ]


def module_files(tree: Path) -> list[str]:
    """Every test module, as pytest is given it."""
    return [str(path.relative_to(tree)) for path in sorted((tree / "tests").rglob("test_*.py"))]


def file_of(folder: Path, module: str) -> Path:
    """Where a module's map is kept."""
    return folder / (module.replace("/", "__") + ".json")
