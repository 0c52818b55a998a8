"""Two kills in each phase of the commands: all end as an undisturbed run. `scripts/kill_table.py` makes any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHASES = (
    "corpus", "vocabulary", "cache", "checkpoint save", "checkpoint deletion", "evaluation", "best", "report", "conversion",
    "generation",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forks"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The undisturbed runs and their programs, made by the first test."""
    return tmp_path_factory.mktemp("kills")


def run_script(name, *arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_phase_the_same_command_ends_as_an_undisturbed_one(folder, phase):
    done = run_script("kill_table.py", "--kills", 2, "--phases", phase, "--folder", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["number"] for result in results if result["phase"] == phase and result["landed"]] == [0, 1]


def test_every_phase_is_killed():
    text = (ROOT / "scripts" / "kill_table.py").read_text()
    assert all(f'    "{phase}": Phase(' in text for phase in PHASES) and text.count(": Phase(") == len(PHASES)


def test_a_disk_that_is_full_at_any_moment_costs_nothing_else(folder):
    done = run_script("full_disk.py", "--folder", folder)
    if done.returncode == 77:
        pytest.skip("a tmpfs cannot be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fine {") == 20
