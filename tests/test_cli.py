"""The command line: help is quick, errors are one message with exit status 2, and overrides reach the config."""

import pytest

from flax_switch import cli
from flax_switch.commands import options
from flax_switch.config import ConfigError


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
    class Args:
        pass

    args = Args()
    options.take_overrides(args, ["--config.train.steps=3", "--config.data.seed", "4", "--gin.model.d_ff=5"])
    assert args.overrides == ["train.steps=3", "data.seed=4"]
    assert args.bindings == ["model.d_ff=5"]
    with pytest.raises(ConfigError, match="Unknown argument"):
        options.take_overrides(args, ["--train.steps=3"])
