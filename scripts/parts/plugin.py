"""A pytest plugin: runs one quarter of the tests, up to a time, and writes what came of every test, for the table at the end.

Loaded with `-p parts.plugin`. A test function, with all its parameters, belongs to one quarter. Those whose duration is on record
(tests/durations.json: cases, and seconds of one) are dealt out so that quarters take equally long; others go by a hash of their
name, so that a new test moves no other.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

QUARTERS = 4
NO_TIME = "not begun: the time of --ci was over"
DURATIONS = Path(__file__).resolve().parents[2] / "tests" / "durations.json"


def pytest_addoption(parser):
    """Adds the plugin's options."""
    group = parser.getgroup("parts")
    group.addoption("--quarter", type=int, default=None, help=f"run this one of {QUARTERS} quarters of the tests chosen, 0 to 3")
    group.addoption(
        "--begin-by", type=float, default=None, help="skip tests that would begin later (seconds since 1970), saying so"
    )
    group.addoption("--outcomes", default="", help="file to write what came of every test to")


def function_of(nodeid: str) -> str:
    """A test's name without its parameters."""
    return nodeid.split("[")[0]


def quarters_on_record(durations: dict[str, tuple[int, float]]) -> dict[str, int]:
    """The quarter of every test function on record: the longest first, each to the quarter that has least to do."""
    load, quarter = [0.0] * QUARTERS, {}
    took = {name: cases * seconds for name, (cases, seconds) in durations.items()}
    for name in sorted(took, key=lambda n: (-took[n], n)):
        quarter[name] = min(range(QUARTERS), key=lambda q: (load[q], q))
        load[quarter[name]] += took[name]
    return quarter


def quarter_of(name: str, on_record: dict[str, int]) -> int:
    """The quarter that a test function belongs to."""
    return on_record[name] if name in on_record else zlib.crc32(name.encode()) % QUARTERS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves the tests of one quarter."""
    wanted = config.getoption("--quarter")
    if wanted is None:
        return
    on_record = quarters_on_record(json.loads(DURATIONS.read_text("utf-8")) if DURATIONS.is_file() else {})
    mine = [item for item in items if quarter_of(function_of(item.nodeid), on_record) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Begins no test when it is too late."""
    begin_by = item.config.getoption("--begin-by")
    if begin_by is not None and time.time() > begin_by:
        pytest.skip(NO_TIME)


def pytest_configure(config):
    """Records in the process that gathers the reports, not in the workers."""
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(config.getoption("--outcomes"))), "parts-outcomes")


class Outcomes:
    """Keeps every test's outcome, duration and, where it was skipped, the reason."""

    def __init__(self, file: Path):
        self.file, self.seconds, self.outcome, self.reason = file, defaultdict(float), {}, {}

    def pytest_runtest_logreport(self, report):
        """Takes a test's set-up, call or tear-down."""
        test = report.nodeid
        self.seconds[test] += report.duration
        if report.failed:
            self.outcome[test] = "failed"
        elif report.skipped:
            self.outcome.setdefault(test, "xfailed" if hasattr(report, "wasxfail") else "skipped")
            self.reason[test] = getattr(report, "wasxfail", None) or (report.longrepr[2] if report.longrepr else "")
        elif report.when == "call":
            self.outcome.setdefault(test, "passed")

    def pytest_collectreport(self, report):
        """A module that cannot be imported has failed."""
        if report.failed:
            self.outcome[report.nodeid] = "failed"

    def pytest_sessionfinish(self):
        """Writes the file."""
        tests = {t: {"outcome": o, "seconds": self.seconds[t], "reason": self.reason.get(t, "")} for t, o in self.outcome.items()}
        self.file.write_text(json.dumps(tests), "utf-8")
