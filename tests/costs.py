"""Hooks that leave to the quick part a few cases, spread over all, of a test that costs much, and run the costliest files first.

tests/durations.json holds what a case of each test takes; `bash scripts/test.sh --all --record` writes it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

ROOM = 2.5  # seconds of the quick part that the cases of one test may take together; one case may take more
LONGEST = 6.0  # seconds from which on a case is slow, unless its test is marked `quick`
UNRECORDED = 0.1  # seconds that a case takes, about, where its test is not worth a record
DURATIONS = Path(__file__).with_name("durations.json")


def quick_cases(cases: int, seconds: float, *, stays: bool = False) -> set[int]:
    """Which cases of a test stay in the quick part, by number.

    seconds: what a case takes. stays: one does, however long it takes.
    """
    if seconds >= LONGEST and not stays:
        return set()
    chosen = min(cases, max(1, int(ROOM / max(seconds, 1e-3))))
    return {i * cases // chosen for i in range(chosen)}


def costliest_files_first(nodeids: list[str], durations: dict[str, tuple[int, float]]) -> list[str]:
    """The tests by file, so that no long file is begun when the other workers have nothing left; as they were within a file."""
    costs = defaultdict(float)
    for test in nodeids:
        costs[test.split("::")[0]] += durations.get(test.split("[")[0], (1, UNRECORDED))[1]
    return sorted(nodeids, key=lambda test: -costs[test.split("::")[0]])


def pytest_configure(config):
    """Has pytest-xdist hand out files as they come, not by the number of their tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Marks as slow what is too much for the quick part; then, of those that are chosen, has workers run costly files first."""
    durations = json.loads(DURATIONS.read_text("utf-8"))
    tests = defaultdict(list)
    for item in items:
        if not any(item.get_closest_marker(part) for part in ("slow", "hardware")):
            tests[item.nodeid.split("[")[0]].append(item)
    for name, cases in tests.items():
        _, seconds = durations.get(name, (1, 0.0))
        stay = quick_cases(len(cases), seconds, stays=any(case.get_closest_marker("quick") for case in cases))
        for number, case in enumerate(cases):
            if number not in stay:
                case.add_marker(pytest.mark.slow)
    yield
    if hasattr(config, "workerinput"):
        chosen = {item.nodeid: item for item in items}
        items[:] = [chosen[test] for test in costliest_files_first(list(chosen), durations)]
