"""The oldest environment's constraints, the Pythons that are found, when what has run is kept, and the table."""

import importlib.util
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SETTINGS = """
[options]
install_requires =
    jax>=0.10
    flax>=0.12.8
[options.extras_require]
lighter = flax[extra]>=0.12.10,<0.13
pinned =
    jax==0.11
old = zstd>=1.0; python_version < "3.14"
"""


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "scripts" / "matrix.py")
    module = sys.modules["matrix"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(matrix, tmp_path, monkeypatch):
    """Another project, of which the matrix is then."""
    (tmp_path / "setup.cfg").write_text(SETTINGS)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / ".venv-matrix")
    return tmp_path


def test_a_minimum_is_the_largest_that_is_asked_for_and_none_of_what_is_pinned(matrix, tree):
    assert matrix.minimums() == {"flax": "0.12.10", "zstd": "1.0"}


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
    place = {"passed": 3, "skipped": 1, "failed": ["tests/a.py::b"], "seconds": 90}
    results = {
        "py312-newest": {"versions": {"python": "3.12.1", "jax": "0.12.0.1"}, "places": {"tests/a": place}},
        "py313-oldest": {"problem": "does not install (status 1)", "places": {}},
    }
    newest, oldest = matrix.table(results).splitlines()[2:]
    assert newest == "| py312-newest | 3.12.1 | 0.12.0.1 | - | - | - | - | 3 | 1 | 1 | 1.5 |"
    assert "does not install" in oldest


def test_what_has_run_is_kept_until_the_tree_changes(matrix, tree, monkeypatch):
    ran = []
    monkeypatch.setattr(matrix, "install", lambda cell: "python")
    monkeypatch.setattr(matrix, "installed_versions", lambda python: {})
    outcome = {"passed": 1, "skipped": 0, "failed": [], "seconds": 1.0}
    monkeypatch.setattr(matrix, "run_place", lambda cell, python, place: ran.append(place) or outcome)
    cell, results = matrix.Cell("one", "python", (3, 11)), {}
    for _ in range(2):
        matrix.run_cell(cell, results, few=False)
    assert ran == [matrix.BESIDE]
    (tree / "tests" / "deeper").mkdir()
    (tree / "tests" / "deeper" / "test_two.py").write_text("")
    matrix.run_cell(cell, results, few=False)
    assert ran == [matrix.BESIDE, "tests/deeper", matrix.BESIDE]
