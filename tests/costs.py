"""A hook that leaves to the quick part a few cases, spread over all, of a test that costs much; the others are slow.

tests/durations.json holds what a case of each test takes; `bash scripts/test.sh --all --record` writes it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

ROOM = 5.0  # seconds of the quick part that the cases of one test may take together; one case may take more
LONGEST = 12.0  # seconds from which on a case is slow, unless its test is marked `quick`
DURATIONS = Path(__file__).with_name("durations.json")


def quick_cases(cases: int, seconds: float, *, stays: bool = False) -> set[int]:
    """Which cases of a test stay in the quick part, by number.

    seconds: what a case takes. stays: one does, however long it takes.
    """
    if seconds >= LONGEST and not stays:
        return set()
    chosen = min(cases, max(1, int(ROOM / max(seconds, 1e-3))))
    return {i * cases // chosen for i in range(chosen)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow what is too much for the quick part."""
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
