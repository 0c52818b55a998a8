"""Hooks that skip, with the reason, what compares with torch or transformers where those are not installed."""

from __future__ import annotations

import pytest

ORACLES = ("torch", "transformers")
REASON = "compares with {}, which is not installed: pip install -e '.[test]'"


def _missing(error: BaseException | None) -> str | None:
    """The oracle whose absence an error, or what it was raised from, is about."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name in ORACLES:
            return error.name
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A test file that imports an oracle is skipped as a whole."""
    report = yield
    call = getattr(report, "call", None)
    oracle = _missing(call.excinfo.value) if call is not None and call.excinfo is not None else None
    if report.outcome == "failed" and oracle is not None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {REASON.format(oracle)}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test or a fixture that imports an oracle is skipped."""
    report = yield
    oracle = _missing(call.excinfo.value) if call.excinfo is not None else None
    if report.outcome == "failed" and oracle is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] + 1, f"Skipped: {REASON.format(oracle)}")
    return report
