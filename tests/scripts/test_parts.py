"""The parts of the suite: quarters are fair and fixed, tables count, and what is asked for by mistake is an error."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from costs import quick_cases

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from parts import newest  # noqa: E402 - scripts are no package
from parts.plugin import QUARTERS, quarter_of, quarters_on_record  # noqa: E402
from parts.run import record_durations  # noqa: E402
from parts.table import Part, render, summary  # noqa: E402


def test_quarters_take_equally_long_and_a_new_test_moves_no_other():
    durations = {f"tests/a.py::test_{i}": (1 + i % 3, 1.0 + 37 * i % 50) for i in range(60)}
    quarters = quarters_on_record(durations)
    load = Counter()
    for name, (cases, seconds) in durations.items():
        load[quarters[name]] += cases * seconds
    assert max(load.values()) - min(load.values()) <= max(cases * seconds for cases, seconds in durations.values())
    before = {name: quarter_of(name, quarters) for name in durations}
    new = quarter_of("tests/b.py::test_new", quarters)
    assert 0 <= new < QUARTERS and before == {name: quarter_of(name, quarters) for name in durations}


def test_what_is_on_record_is_the_mean_of_cases_and_stays_where_a_test_did_not_run(tmp_path):
    part = Part("quick", seconds={"tests/a.py::test_x[1]": 3.0, "tests/a.py::test_x[2]": 1.0, "tests/a.py::test_y": 0.2})
    file = tmp_path / "durations.json"
    file.write_text('{"tests/b.py::test_z": [1, 9.0]}')
    record_durations([part], whole=False, file=file)
    assert json.loads(file.read_text()) == {"tests/a.py::test_x": [2, 2.0], "tests/b.py::test_z": [1, 9.0]}
    record_durations([part], whole=True, file=file)
    assert json.loads(file.read_text()) == {"tests/a.py::test_x": [2, 2.0]}


def test_costly_cases_are_slow_and_some_stay():
    assert quick_cases(8, 0.1) == set(range(8)), "they have room"
    assert quick_cases(8, 1.2) == {0, 4}, "two have, from all over the list"
    assert quick_cases(8, 5.0) == {0}, "one, though it has not"
    assert quick_cases(8, 6.0) == set() and quick_cases(8, 6.0, stays=True) == {0}


def test_the_cases_that_are_quick_and_those_that_are_slow_are_all(tmp_path):
    """By pytest itself, in a suite of its own; one case that is asked for by name runs."""
    shutil.copy(ROOT / "tests" / "costs.py", tmp_path)
    (tmp_path / "conftest.py").write_text("from costs import pytest_collection_modifyitems")
    (tmp_path / "durations.json").write_text('{"test_small.py::test_x": [6, 1.2], "test_small.py::test_y": [1, 60]}')
    (tmp_path / "test_small.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(6))\ndef test_x(i): pass\ndef test_y(): pass\ndef test_z(): pass"
    )

    def chosen(*options):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]

    assert chosen("-m", "not slow") == ["test_x[0]", "test_x[3]", "test_z"]
    assert chosen("-m", "slow") == ["test_x[1]", "test_x[2]", "test_x[4]", "test_x[5]", "test_y"]
    assert chosen("-m", "not slow", "test_small.py::test_x[5]") == ["test_x[5]"]


def test_a_worker_begins_with_the_file_that_takes_longest(tmp_path):
    """By pytest itself: what is on record decides, of what is chosen, and not the number of a file's tests or its name."""
    shutil.copy(ROOT / "tests" / "costs.py", tmp_path)
    (tmp_path / "conftest.py").write_text("from costs import pytest_collection_modifyitems, pytest_configure")
    (tmp_path / "durations.json").write_text('{"test_b.py::test_2": [1, 2.0], "test_c.py::test_2": [1, 60]}')
    for name, tests in {"a": 5, "b": 2, "c": 3}.items():
        text = "\n".join(f"def test_{i}(): pass" for i in range(1, tests + 1))
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-n1", "--dist", "loadfile", "-m", "not slow"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    ran = [line.split("PASSED test_")[1] for line in done.stdout.splitlines() if "PASSED" in line]
    assert "".join(test[0] for test in ran) == "bbaaaaacc", done.stdout
    assert [test.strip()[-1] for test in ran[:2]] == ["1", "2"], "in a file they stay as they are written"


def test_every_test_is_in_one_quarter():
    """By pytest itself, in a suite of its own."""
    names = [f"test_{i}" for i in range(12)]
    seen = Counter()
    for quarter in range(QUARTERS):
        seen.update(collected([f"--quarter={quarter}"], names))
    assert seen == Counter(names)


@pytest.mark.parametrize(("seconds", "said"), [(-1, "2 skipped"), (600, "1 failed, 1 passed")])
def test_no_test_begins_when_the_time_is_over_and_those_that_do_not_are_told(tmp_path, seconds, said):
    (tmp_path / "test_small.py").write_text("def test_a(): pass\ndef test_b(): assert False")
    outcomes = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "pytest", "-p", "parts.plugin", "-p", "no:cacheprovider", f"--outcomes={outcomes}"]
    done = subprocess.run(
        [*command, f"--begin-by={time.time() + seconds:.0f}"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": ""},
    )  # fmt: skip
    assert said in done.stdout
    reasons = {test["reason"] for test in json.loads(outcomes.read_text()).values() if test["outcome"] == "skipped"}
    assert reasons == ({"Skipped: not begun: the time of --ci was over"} if seconds < 0 else set())


def collected(options, names):
    """The tests of a small suite that are left with these options."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_small.py").write_text("\n".join(f"def {name}(): pass" for name in names))
        command = [sys.executable, "-m", "pytest", "-p", "parts.plugin", "-p", "no:cacheprovider", "--collect-only", "-q", *options]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": ""}
        )
    return [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]


def test_the_last_line_counts_tests_and_parts_and_a_flaky_test_is_none_that_failed():
    quick = Part("quick", 2.0, False, Counter(passed=5, failed=1, skipped=2), Counter({"no glibc": 2}), ["tests/a.py::test_x"])
    slow = Part("slow", 1.0, True, Counter(passed=3), flaky=["tests/b.py::test_y"])
    assert summary([quick, slow]) == "==== 8 passed, 1 failed, 1 flaky, 2 skipped in 3.0 min ===="
    assert summary([Part("lint", 0.1, False), slow]) == "==== 3 passed, 1 failed, 1 flaky in 1.1 min ===="
    text = render([quick, slow])
    for told in ("FAILED tests/a.py::test_x", "FLAKY (failed, then passed alone): tests/b.py::test_y", "2 skipped: no glibc"):
        assert told in text
    assert text.endswith(summary([quick, slow]))


def test_without_a_new_python_the_part_says_that_it_did_not_run(monkeypatch):
    monkeypatch.setattr(newest, "newest_python", lambda: None)
    part = newest.newest_part([])
    assert part.ok and part.note.startswith("NOT RUN")


@pytest.mark.parametrize("wrong", [["--quik"], ["tests/ops"], ["-m", "slow"]])
def test_an_unknown_part_is_an_error_that_lists_them(wrong):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "test.sh"), *wrong], capture_output=True, text=True)
    assert done.returncode == 1 and f"does not know {wrong[0]}" in done.stderr and "--slow-part N" in done.stderr


@pytest.mark.parametrize("wrong", [["--slow-part", "4"], ["--ci", "--all"], ["--slow", "--quik"]])
def test_parts_that_do_not_go_together_are_an_error_that_lists_them(wrong):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "run_tests.py"), *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and "quarter N of the slow tests" in done.stderr
