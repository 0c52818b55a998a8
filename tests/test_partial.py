"""`flax-switch generate --output`: nothing is touched before all is checked, and what was finished outlives a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flax_switch.cli import main
from flax_switch.commands.partial import Partial
from flax_switch.config import ConfigError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
RESULTS = [{"line": n, "input": f"text {n}", "outputs": [f"output é\u2028 \x85{n}"]} for n in (1, 2, 4, 5)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def cut_off(output, run, results, ending=""):
    """What a run that was killed after some results leaves, and half a line."""
    with Partial(output, run, resume=False) as partial:
        partial.add(results)
    path = output.with_name("out.jsonl.partial")
    path.write_text(path.read_text(encoding="utf-8") + ending, encoding="utf-8")
    return path


def test_an_output_is_written_whole_and_in_order_at_the_end(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("former")
    with Partial(output, {"seed": 1}, resume=False) as partial:
        partial.add(RESULTS[2:])
        assert output.read_text() == "former"
        partial.add(RESULTS[:2])
        partial.finish()
    assert lines_of(output) == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("ending", ["", '{"line": 5, "inp'])
def test_a_run_that_was_cut_off_continues_with_what_is_missing(tmp_path, ending):
    output = tmp_path / "out.jsonl"
    cut_off(output, {"seed": 1}, RESULTS[:3], ending)
    with Partial(output, {"seed": 1}, resume=True) as partial:
        assert sorted(partial.done) == [1, 2, 4]
        partial.add(RESULTS[3:])
        partial.finish()
    assert lines_of(output) == RESULTS


def test_what_another_run_left_is_neither_lost_nor_taken(tmp_path):
    output = tmp_path / "out.jsonl"
    path = cut_off(output, {"seed": 1}, RESULTS)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="holds 4 finished lines .*--resume"):
        Partial(output, {"seed": 1}, resume=False)
    with pytest.raises(ConfigError, match="another input, checkpoint or other controls"):
        Partial(output, {"seed": 2}, resume=True)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="Cannot write .*it is a folder"):
        Partial(tmp_path, {}, resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Cannot write"), Partial(tmp_path / "file" / "out.jsonl", {}, resume=False):
        pass


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`flax-switch generate` with a model that repeats its input; `fail_at` a batch it is killed."""
    config = SimpleNamespace(vocab_size=9)
    opened = SimpleNamespace(config=config, path=tmp_path)
    state = SimpleNamespace(fail_at=None, seen=[])

    def generate_lines(pretrained, lines, *, on_batch, on_results, batch_size, **options):
        results = []
        for start in range(0, len(lines), batch_size):
            if state.fail_at is not None and len(state.seen) >= state.fail_at:
                raise KeyboardInterrupt
            batch = [{"line": line.number, "input": line.text, "outputs": [line.text.upper()]} for line in lines[start : start + 2]]
            state.seen.append([result["line"] for result in batch])
            on_results(batch)
            results += batch
        return results

    monkeypatch.setattr("flax_switch.convert.checkpoint.open_checkpoint", lambda path, **_: opened)
    monkeypatch.setattr("flax_switch.pretrained.from_checkpoint", lambda opened, **_: SimpleNamespace(expert_reads=None))
    monkeypatch.setattr("flax_switch.generation.text.generate_lines", generate_lines)
    monkeypatch.setattr("flax_switch.config.generation.GenerationConfig.for_model", lambda self, config: self)
    (tmp_path / "in.txt").write_text("a\nb\n\nc\nd\ne\n")

    def run(*more, output="out.jsonl"):
        argv = ["generate", "--checkpoint", str(tmp_path), "--input", str(tmp_path / "in.txt"), "--batch-size", "2"]
        return main([*argv, "--output", str(tmp_path / output), *more])

    return run, state


def test_the_command_continues_after_a_kill(command, tmp_path, capsys):
    run, state = command
    state.fail_at = 2
    with pytest.raises(BaseException):  # noqa: B017, PT011 - the kill
        raise SystemExit(run())
    assert not (tmp_path / "out.jsonl").exists()
    state.fail_at, state.seen = None, []
    assert run() == 2, "nobody asked to continue"
    assert "--resume" in capsys.readouterr().err
    assert run("--resume") == 0
    assert state.seen == [[6]], "finished lines are not made again"
    assert [(r["line"], r["outputs"]) for r in lines_of(tmp_path / "out.jsonl")] == [
        (1, ["A"]), (2, ["B"]), (4, ["C"]), (5, ["D"]), (6, ["E"]),
    ]  # fmt: skip


def test_the_input_is_not_the_output(command, tmp_path, capsys):
    run, state = command
    (tmp_path / "link.txt").symlink_to(tmp_path / "in.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "in.txt")
    for name in ("in.txt", "link.txt", "hard.txt"):
        assert run(output=name) == 2
        assert "is the input" in capsys.readouterr().err
    assert (tmp_path / "in.txt").read_text().startswith("a\nb") and not state.seen


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="standard input has no name here")
def test_standard_input_may_be_the_output_s_file_too(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a\n")
    code = "from flax_switch.host.files import check_writable; check_writable('in.txt', reads=['/dev/stdin'])"
    command, options = [sys.executable, "-c", code], dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    with open(tmp_path / "in.txt") as given:
        ended = subprocess.run(command, stdin=given, **options)
    assert "it is the input" in ended.stderr
    ended = subprocess.run(command, input="a", **options)
    assert ended.returncode == 0, ended.stderr
