"""What a run writes down may be damaged: a line is left out, or the report is refused in a sentence; nothing is written over."""

import json

import pytest
from test_report import make_run

from flax_switch import cli
from flax_switch.training.metrics import MetricsWriter, read_metrics
from flax_switch.training.sessions import read_sessions


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def spoil(path, row, line):
    lines = path.read_bytes().splitlines()
    lines[row] = line
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    "line", [b"\xff", b"{}", b'{"step": "x", "kind": "train"}', b'{"step": 3}', b"[1]", b'{"step": 3, "kind": 4}']
)
def test_a_line_of_metrics_that_is_none_is_left_out(run, line):
    whole = list(read_metrics(run))
    spoil(run / "metrics.jsonl", 2, line)
    assert list(read_metrics(run)) == whole[:2] + whole[3:]
    MetricsWriter(run, resume_step=40).close()
    assert [one["step"] for one in read_metrics(run)] == [20, 40]


@pytest.mark.parametrize("line", [b"\xff", b"{}", b'{"event": 3, "time": "x"}', b"null"])
def test_a_line_of_sessions_that_is_none_is_left_out(run, line):
    whole = read_sessions(run)
    spoil(run / "sessions.jsonl", 0, line)
    assert read_sessions(run) == whole[1:]
    assert cli.main(["report", str(run)]) in (0, 2)


def test_reports_of_one_and_of_several_name_what_is_damaged(run, tmp_path, capsys):
    other = make_run(tmp_path / "other")
    spoil(run / "metrics.jsonl", 0, json.dumps({"step": 20, "kind": "train", "loss": "x"}).encode())
    for arguments in ([run], [run, other, "--output", tmp_path / "page.html"]):
        assert cli.main(["report", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert "metrics.jsonl" in said and "is damaged" in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "samples.json", "sessions.jsonl"])
def test_a_report_is_not_written_over_what_it_is_made_from(run, tmp_path, name, capsys):
    other = make_run(tmp_path / "other")
    before = (run / name).read_bytes()
    for runs in ([run], [run, other]):
        assert cli.main(["report", *map(str, runs), "--output", str(run / name)]) == 2
        assert "it is the input" in capsys.readouterr().err
    assert (run / name).read_bytes() == before
