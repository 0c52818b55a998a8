"""The newcomer's first hour: its kept transcript is of the commands that the script has, and the commands are understood."""

import sys
from pathlib import Path

import pytest
from documented.running import commands_of, load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import first_hour  # noqa: E402

PAGE = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("typed", [step[0] for step in first_hour.STEPS if "flax-switch " in step[0]])
def test_every_command_is_understood(typed, tmp_path, monkeypatch):
    (argv,) = [["--version"]] if typed.endswith("--version") else commands_of(typed)
    if argv[0] in ("pretrain", "finetune"):
        assert load(argv) is not None


def test_the_kept_transcript_is_of_these_commands_in_their_order():
    typed = [line.removeprefix("$ ") for line in PAGE.replace(" \\\n    ", " ").splitlines() if line.startswith("$ ")]
    assert typed[1:] == [step[0] for step in first_hour.STEPS]
    assert "pip install 'dist/flax_switch-" in typed[0]


def test_what_each_command_must_say_is_in_the_transcript_and_no_path_of_the_machine():
    answers = PAGE.split("```text\n")[2:]
    for answer, (_, _, expected) in zip(answers, first_hour.STEPS, strict=True):
        assert expected in answer
    assert "/tmp/" not in PAGE and str(Path.home()) not in PAGE
    assert "Traceback" not in PAGE and "Warning:" not in PAGE
