"""Which tests a mutant meets, and in which order: first those that run its line, the nearest and fastest before the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from mutation.coverage_map import CoverageMap
from mutation.sites import Site

FIRST_BATCH, GROWTH = 8.0, 3.0  # seconds of tests that one process runs, and how much more the next one does


@dataclass(frozen=True)
class Batch:
    """Tests that one process runs, up to the first failure."""

    tests: dict[str, list[str]]  # of every module, in order
    seconds: float  # that they took when nothing was changed

    @property
    def limit(self) -> float:
        """Seconds after which the code is taken to hang."""
        return 3 * self.seconds + 60


def covering_tests(site: Site, coverage: CoverageMap) -> dict[str, list[str]]:
    """For every test module, the tests that run the site; where it runs at import only, those that run the body it belongs to.

    What a test runs while it imports the file is no use of it, so for defaults and values of modules bodies come first.
    """
    in_a_function, bodies = any(site.line in body for body in site.lookups[2:3]), site.lookups[2:]
    for lines in site.lookups if in_a_function else (*bodies, *site.lookups[:2]):
        found = coverage.covering(site.file, lines)
        if in_a_function:  # that runs at import, too, if it makes values of its module: those who import it then judge it
            found = {module: coverage.tests_of_module(module) for module in coverage.importing(site.file, lines)} | found
        if found:
            return found
    importing = coverage.importing(site.file) if not bodies else []  # a file without functions
    return {module: coverage.tests_of_module(module) for module in importing}


def namesake(file: str) -> str:
    """The test module that is named as the file is: what it starts in processes of its own no coverage tells of."""
    parts = PurePath(file).parts
    return PurePath("tests", *parts[1:-1], f"test_{parts[-1]}").as_posix()


def batches(site: Site, coverage: CoverageMap, hint: str | None, most_seconds: float) -> list[Batch]:
    """What to run for the site, one batch after the other; `hint` is a test that once failed, and comes alone and first.

    A function that is compiled once for a module runs in the module's first test and is judged by the others too, so the rest
    of a module follows after the tests that run the line themselves. No more than `most_seconds` are spent.
    """
    direct = covering_tests(site, coverage)
    units = [(module, tests) for module, tests in direct.items()]
    own = namesake(site.file)
    units += [(own, coverage.tests_of_module(own))] if own in coverage.modules and own not in direct else []
    rest = [(module, [t for t in coverage.tests_of_module(module) if t not in tests]) for module, tests in direct.items()]
    order = [*_in_order(units, site, coverage), *_in_order([unit for unit in rest if unit[1]], site, coverage)]
    made = (
        [_batch([(hint.split("::")[0], [hint])], coverage)] if hint in coverage.seconds and hint not in coverage.unreliable else []
    )
    return made + _cut(order, coverage, most_seconds)


def _in_order(units: list, site: Site, coverage: CoverageMap) -> list:
    folder = PurePath(site.file).parts[1]
    name = PurePath(site.file).stem

    def cost(unit):
        module, tests = unit
        near = 0.05 if name in module else 0.3 if f"/{folder}/" in module else 1.0
        return near * (1.0 + sum(coverage.seconds[t] for t in tests))

    ordered = sorted(units, key=cost)
    return [(module, sorted(tests, key=lambda t: coverage.seconds[t])) for module, tests in ordered]


def _cut(order: list, coverage: CoverageMap, most_seconds: float) -> list[Batch]:
    made, size, left, current = [], FIRST_BATCH, most_seconds, []
    for module, tests in order:
        taken = []
        for test in tests:
            if left <= 0:
                break
            left -= coverage.seconds[test]
            taken.append(test)
        if taken:
            current.append((module, taken))
        if current and _seconds(current, coverage) >= size:
            made.append(_batch(current, coverage))
            current, size = [], size * GROWTH
    return [*made, _batch(current, coverage)] if current else made


def _seconds(units: list, coverage: CoverageMap) -> float:
    return sum(coverage.seconds[test] for _, tests in units for test in tests)


def _batch(units: list, coverage: CoverageMap) -> Batch:
    tests: dict[str, list[str]] = {}
    for module, of_module in units:
        tests.setdefault(module, []).extend(of_module)
    return Batch(tests, _seconds(units, coverage))
