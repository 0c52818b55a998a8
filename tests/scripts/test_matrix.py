"""The oldest environment's constraints, the Pythons that are found, and the table."""

import importlib.util
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "scripts" / "matrix.py")
    module = sys.modules["matrix"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14", "3.15"])
def test_every_package_is_pinned_once_for_every_python_and_never_below_its_minimum(matrix, python):
    lines = [Requirement(line) for line in matrix.constraints().splitlines() if not line.startswith("#")]
    pins = [r for r in lines if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert sorted(r.name for r in pins) == sorted(matrix.minimums())
    for pin in pins:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert Requirement(f"{pin.name}>={matrix.minimums()[pin.name]}").specifier.contains(version)


def test_newest_and_oldest_come_for_every_python_and_oracles_for_the_first(matrix):
    found = {(3, 11): "/a/python3.11", (3, 13): "/b/python3.13"}
    cells = {cell.name: cell for cell in matrix.cells(found)}
    assert {"py311-newest", "py311-oldest", "py313-newest", "py313-oldest", "transformers-4.57"} <= set(cells)
    assert cells["py313-oldest"].oldest and cells["py313-oldest"].python == "/b/python3.13"
    assert cells["transformers-5.23"].version == (3, 11)


def test_a_python_that_does_not_start_is_passed_over(matrix, tmp_path, monkeypatch):
    shim = tmp_path / "python3.14"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.14: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.pythons() == {}


def test_the_table_counts_what_failed_and_says_what_did_not_install(matrix):
    file = {"passed": 3, "skipped": 1, "failed": ["tests/a.py::b"], "seconds": 90}
    results = {
        "py312-newest": {"versions": {"python": "3.12.1", "jax": "0.12.0.1"}, "files": {"tests/a.py": file}},
        "py313-oldest": {"problem": "does not install (status 1)", "files": {}},
    }
    newest, oldest = matrix.table(results).splitlines()[2:]
    assert newest == "| py312-newest | 3.12.1 | 0.12.0.1 | - | - | - | - | 3 | 1 | 1 | 1.5 |"
    assert "does not install" in oldest
