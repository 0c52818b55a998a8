"""The command line: help is quick, errors are one message with exit status 2, and overrides reach the config."""

import re

import numpy as np
import pytest

from flax_switch import cli
from flax_switch.commands import options
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.convert.canonical import canonical_shapes, unflatten
from flax_switch.pretrained import save_pretrained


def test_every_command_has_help(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert f"flax-switch {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}", "--config.train.stepss=3"], "Did you mean 'steps'"),
        (["pretrain", "--config", "configs/tinny.py", "--workdir", "{tmp}"], "Did you mean configs/tiny.py?"),
        (["pretrain", "--workdir", "{tmp}"], "Name a recipe"),
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}", "--steps=3"], "Unknown argument '--steps=3'"),
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}", "--gin.train.steps=3"], "with --config use"),
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}", "--config.model.num_heads=0"], "at least 1"),
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}/a", "--config.data.source={tmp}/no.txt"], "no.txt"),
        (["pretrain", "--config", "configs/tiny.py", "--workdir", "{tmp}/b", "--config.mesh.expert=3"], "do not fit 8 devices"),
        (["report", "{tmp}"], "no workdir of a run"),
    ],
)
def test_mistakes_are_one_clear_message(argv, message, tmp_path, capsys):
    assert cli.main([a.format(tmp=tmp_path) for a in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_vocabulary_larger_than_the_model_is_refused_with_the_size_to_set(tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text("".join(f"The quick brown fox number {i} jumps over the lazy dog {i * 7} times.\n" for i in range(300)))
    argv = ["pretrain", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "run"), f"--config.data.source={source}"]
    argv += ["--config.data.vocabulary_size=60", "--config.model.vocab_size=128", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    assert cli.main([*argv, "--config.data.batch_size=8"]) == 2
    assert "set model.vocab_size=256" in capsys.readouterr().err


def test_overrides_are_read_with_and_without_an_equals_sign():
    args, _ = cli.parse_known(["pretrain", "--workdir", "x"])
    options.take_overrides(args, ["--config.train.steps=3", "--config.data.seed", "4", "--gin.model.d_ff=5"])
    assert args.overrides == ["train.steps=3", "data.seed=4"]
    assert args.bindings == ["model.d_ff=5"]
    with pytest.raises(ConfigError, match="Unknown argument"):
        options.take_overrides(args, ["--train.steps=3"])


def test_options_are_written_with_hyphens_and_underscores_do_as_well():
    plain = ["pretrain", "--workdir", "some_run", "--gin-file", "configs/gin/tiny.gin", "--num-processes=2"]
    known, rest = cli.parse_known([*plain, "--config.data.batch_size=4"])
    assert (known.gin_file, known.num_processes, known.workdir) == (["configs/gin/tiny.gin"], 2, "some_run")
    assert rest == ["--config.data.batch_size=4"]
    underscored = [a.replace("--gin-file", "--gin_file").replace("--num-processes", "--num_processes") for a in plain]
    found, _ = cli.parse_known(underscored)
    assert (found.gin_file, found.num_processes) == (known.gin_file, known.num_processes)
    options.take_overrides(found, ["--gin.train.steps=2"])
    assert options.load_config(found).train.steps == 2


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_spells_every_option_with_hyphens(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert not re.search(r"--\w+_", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrain", "--workdir", "x", "--worrkdir", "y"], "Unknown argument '--worrkdir'; did you mean --workdir?"),
        (["pretrain", "--workdir", "x", "--steps=3"], "Unknown argument '--steps=3'; did you mean --config.train.steps?"),
        (["pretrain", "--workdir", "x", "--batch_sise=3"], "did you mean --config.data.batch_size?"),
        (["distill", "--workdir", "x", "--teacher", "y", "--config.evaluation.num_beams=3"], "it is 'evaluation'"),
        (["evaluate", "--checkpoint", "x", "--config.optimizer.b1=3"], "The section of --config.optimizer.b1 must be one of"),
        (["pretrain", "--workdir", "x", "--gin.trian.steps=3"], "it is 'trian'. Did you mean 'train'?"),
        (["generate", "--checkpoint", "x", "--num_beam", "3"], "Unknown argument '--num-beam'; did you mean --num-beams?"),
        (["generate", "--checkpoint", "x", "--batchsize", "3"], "did you mean --batch-size?"),
        (["generate", "--checkpoint", "x", "--num-beams"], "--num-beams needs a value"),
        (["generate", "--checkpoint", "x", "--config.model.d_ff=3"], "Unknown argument '--config.model.d_ff=3'"),
        (["convert", "x", "y", "--to", "huggingface", "--config.model.d_ff=3"], "Unknown argument '--config.model.d_ff=3'"),
        (["inspect", "x", "--jsn"], "Unknown argument '--jsn'; did you mean --json? See flax-switch inspect --help."),
        (["report", "x", "--opne"], "Unknown argument '--opne'; did you mean --open?"),
    ],
)  # fmt: skip
def test_what_a_command_does_not_take_is_refused_by_name_with_the_nearest(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied."),
        (OSError(28, "No space left on device"), "no space left on the disk"),
        (MemoryError("Unable to allocate 9 TiB"), "memory is not enough (Unable to allocate 9 TiB)"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),  # of another than standard output
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_operating_system_refuses_is_one_message(monkeypatch, capsys, error, words):
    def run(args):
        raise error

    monkeypatch.setattr("flax_switch.commands.presets.run", run)
    assert cli.main(["presets"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("flax-switch presets: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-beams", "0"], "num_beams must be at least 1"),
        (["--temperature", "0.5"], "temperature=0.5 has no effect without do_sample=True"),
        (["--suppress-tokens", "[999]"], "suppress_tokens holds 999, which is no id of the vocabulary of 64"),
        (["--seed", "-1"], "seed must be an integer of at least 0"),
        (["--batch_size", "0"], "--batch-size must lie in [1, 1048576]; it is 0"),
        (["--batch-size", "1" * 20], "--batch-size must lie in [1, 1048576]"),
        (["--max-source-length", "-1"], "--max-source-length must lie in [1, 1048576]"),
        (["--do-sample", "--seed", "4294967296"], "below 2**32"),
        (["--format", "yaml"], "--format must be one of"),
        (["--format", "plain", "--output", "{tmp}/out.jsonl"], "--format is of standard output"),
        (["--input", "{tmp}/none.txt"], "Cannot read"),
        (["--output", "{tmp}/none/out.jsonl"], "Cannot write"),
    ],
)
def test_generate_checks_its_settings_before_it_loads_weights(more, message, tmp_path, monkeypatch, capsys):
    config = SwitchConfig(
        vocab_size=64, d_model=8, num_heads=1, d_kv=8, d_ff=8, num_encoder_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0,
    )  # fmt: skip
    tree = {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(config).items()}
    save_pretrained(tmp_path / "model", config, unflatten(tree), format="flax_switch")
    (tmp_path / "in.txt").write_text("a\n")
    monkeypatch.setattr("flax_switch.pretrained.from_checkpoint", lambda *_, **__: pytest.fail("weights were loaded"))
    argv = ["generate", "--checkpoint", str(tmp_path / "model"), "--input", str(tmp_path / "in.txt")]
    assert cli.main([*argv, *(a.format(tmp=tmp_path) for a in more)]) == 2
    assert message in capsys.readouterr().err
