"""Figures in benchmarks/results were each written by one run, which says how it was made."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_says_by_what_and_where_it_was_made(file):
    about = json.loads(file.read_text())["about"]
    program, *arguments = shlex.split(about["command"])
    assert not [word for word in arguments if word.startswith(("/", "~"))], "a path of one machine"
    if program == "flax-switch":  # a plan depends on the compilers and not on this machine
        assert about["host"] and about["time"]
    else:
        assert (ROOT / arguments[0]).is_file() and (program, Path(arguments[0]).parts[0]) == ("python", "benchmarks")
        assert about["processor"]["name"] and about["date"]
        assert len(about["load_before"]) == len(about["load_after"]) == 3
    assert {"jax", "jaxlib", "numpy"} <= about["versions"].keys()
