"""What can be refused is refused before work begins: destinations that cannot be written, settings that cannot be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_switch.workflows.finetune
import flax_switch.workflows.report
from flax_switch.cli import main
from flax_switch.config import ConfigError
from flax_switch.host.files import check_writable
from flax_switch.training.checkpoint import CONFIG_FILE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flax_switch"


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "options", "why"),
    [
        ("folder", {}, "it is a folder"),
        ("absent/x", {}, "there is no folder"),
        ("file/x", {}, "file is no folder"),
        ("file/x/y", {"make_folders": True}, "no folder"),
        ("file", {"reads": ["file"]}, "it is the input"),
        ("folder/../file", {"reads": ["absent", "file"]}, "it is the input"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_by_its_reason(places, monkeypatch, path, options, why):
    monkeypatch.chdir(places)
    with pytest.raises(ConfigError, match=f"^Cannot write {path}: .*{why}"):
        check_writable(path, **options)
    check_writable("new")
    check_writable("file", reads=["new"])
    check_writable("a/b/c", make_folders=True)
    assert not Path("a").exists() and not Path("new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are Unix's")
def test_a_pipe_is_no_place_for_a_file_that_is_renamed(places):
    os.mkfifo(places / "pipe")
    with pytest.raises(ConfigError, match="it is no regular file"):
        check_writable(places / "pipe")


@pytest.mark.parametrize("kind", ["folder", "absent/x", "file/x"])
def test_every_command_refuses_its_output_before_it_works(places, monkeypatch, capsys, kind):
    def begun(*args, **kwargs):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(flax_switch.workflows.report, "_report", begun)
    monkeypatch.setattr(flax_switch.workflows.finetune, "evaluate_checkpoint", begun)
    monkeypatch.setattr("flax_switch.pretrained.load_pretrained", begun)
    monkeypatch.setattr("flax_switch.commands.plan.load_config", begun)
    monkeypatch.setattr("flax_switch.inspection.run_routing.follow", begun)
    (places / "config.json").write_text('{"kind": "pretraining"}')
    path = str(places / kind)
    for arguments in (
        ["report", str(places), "--output", path],
        ["plan", "--config", "tiny", "--topology", "cpu:1", "--json", path],
        *([] if kind == "absent/x" else [["routing", str(places), "--output", path]]),
        *([] if kind == "absent/x" else [["inspect", "model", "--text", "a", "--plot", f"{path}.png" if "/" in kind else path]]),
        *([] if kind != "file/x" else [["evaluate", "--config", "finetune_summarization", "--checkpoint", "x", "--output", path]]),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "Cannot write" in said or "ending of a plot" in said, (arguments, said)


def test_files_are_written_beside_and_renamed_in_one_place():
    """Others write into a folder that is not there yet under its name: a cache's, a conversion's."""
    writers = re.compile(r"(?<!files)\.write_(text|bytes)\(|savefig\(path|open\([^)]*\"[wx]b?\"")
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if writers.search(path.read_text())}
    assert found == {"host/files.py", "data/cache.py", "convert/folder.py", "convert/safetensors_file.py"}


def test_a_workdir_is_not_claimed_by_settings_that_are_refused_after_the_claim(tmp_path, capsys):
    corpus, workdir = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text("".join(f"the quick brown fox {i} jumps over the lazy dog\n" for i in range(300)))
    settings = [
        f"--config.data.source={corpus}",
        "--config.data.vocabulary_size=60",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    command = ["pretrain", "--config", "tiny", "--workdir", str(workdir), *settings]
    assert main([*command, "--config.model.vocab_size=50"]) == 2
    assert "set model.vocab_size" in capsys.readouterr().err
    assert not (workdir / CONFIG_FILE).exists() and not (workdir / "vocabulary").exists()
    assert main([*command, "--config.data.heldout_fraction=1e-12"]) == 2
    assert "held-out" in capsys.readouterr().err
    assert main([*command, "--config.data.batch_size=7"]) == 2
    assert not workdir.exists() or not list(workdir.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
@pytest.mark.parametrize(
    "arguments", ["presets --json", "recipes", "recipes tiny", "presets", "--help", "pretrain --help", "--version"]
)
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flax_switch", *arguments.split()]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, text=True, timeout=60)
    os.close(writing)
    silent = arguments.endswith(("--help", "--version"))  # argparse itself says nothing of it
    assert ended.returncode in (0 if silent else 141, 141)
    assert ended.stderr == ""
