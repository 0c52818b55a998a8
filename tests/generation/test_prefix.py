"""A fine-tuned model's prefix is remembered in its folder, put before texts by `generate`, and left out when asked."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers

from flax_switch import cli
from flax_switch.commands import generate
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.convert.canonical import canonical_shapes, unflatten
from flax_switch.convert.checkpoint import convert
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.generation import text
from flax_switch.generation.defaults import read_defaults, read_prefixes, write_prefixes
from flax_switch.pretrained import load_pretrained, save_pretrained

PREFIX = "summarize: "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "model"
    config = SwitchConfig(
        vocab_size=128, d_model=8, num_heads=1, d_kv=8, d_ff=8, num_encoder_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0,
    )  # fmt: skip
    vocabulary = Vocabulary.train([f"summarize: the quick brown fox {i} jumps" for i in range(300)], 40)
    tree = {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(config).items()}
    save_pretrained(folder, config, unflatten(tree), vocabulary, format="flax_switch")
    write_prefixes(folder, [PREFIX], config)
    return folder


def test_a_folder_remembers_its_prefix_and_a_runs_step_has_its_runs(model, tmp_path):
    assert read_prefixes(model) == (PREFIX,)
    assert PREFIX not in read_defaults(model).values()  # it is no control
    (tmp_path / "run" / "checkpoints" / "200").mkdir(parents=True)
    assert read_prefixes(tmp_path / "run" / "checkpoints" / "200") == ()
    write_prefixes(tmp_path / "run", [PREFIX], SwitchConfig())
    assert read_prefixes(tmp_path / "run" / "checkpoints" / "200") == (PREFIX,)
    (tmp_path / "run" / "generation_config.json").write_text('{"prefix": 3}')
    with pytest.raises(ConfigError, match="field 'prefix' must be text or an array or null; it is a whole number"):
        read_prefixes(tmp_path / "run")


def test_a_model_without_a_prefix_gets_no_file(tmp_path):
    write_prefixes(tmp_path, ["", ""], SwitchConfig())
    assert list(tmp_path.iterdir()) == []


def test_it_travels_with_a_conversion_and_transformers_opens_what_it_travelled_with(model, tmp_path):
    convert(str(model), str(tmp_path / "exported"), to="huggingface")
    assert read_prefixes(tmp_path / "exported") == (PREFIX,)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "exported").prefix == PREFIX
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")
    tokens = theirs.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=3)  # begins with the model's start token
    ours = load_pretrained(tmp_path / "exported").generate([[5, 6, 1]], max_new_tokens=3).sequences
    assert tokens.tolist() == ours.tolist()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], PREFIX),
        (["--no-prefix"], ""),
        (["--prefix", "translate: "], "translate: "),
    ],
)
def test_generate_puts_it_before_every_text_unless_told_not_to(more, expected, model, tmp_path, monkeypatch, capsys):
    encoded = []
    monkeypatch.setattr(Vocabulary, "encode", lambda self, line: encoded.append(line) or [3])
    monkeypatch.setattr(text, "generate_batches", lambda *args, **options: iter(()))
    monkeypatch.setattr(text, "generate_lines", keep_going(text.generate_lines))
    (tmp_path / "in.txt").write_text(f"the fox\n{PREFIX}the dog\n")
    argv = ["generate", "--checkpoint", str(model), "--input", str(tmp_path / "in.txt")]
    cli.main([*argv, *more])
    assert encoded == [expected + "the fox", (PREFIX if expected in ("", PREFIX) else expected + PREFIX) + "the dog"]


def keep_going(function):
    """Results are of no interest here, and none are made."""

    def called(*args, **options):
        try:
            return function(*args, **options)
        except KeyError:
            return []

    return called


def test_results_show_the_text_as_it_was(model, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("the fox\n")
    assert cli.main(["generate", "--checkpoint", str(model), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == "the fox"


@pytest.mark.parametrize(("terminal", "form", "plain"), [(True, None, True), (True, "json", False), (False, "plain", True)])
def test_outputs_stand_alone_on_a_terminal_and_where_it_is_asked_for(terminal, form, plain, model, tmp_path, monkeypatch, capsys):
    results = [{"line": 1, "outputs": ["one", "two"]}, {"line": 2, "error": "bad"}, {"line": 3, "outputs": ["three"]}]
    monkeypatch.setattr(generate, "_results", lambda *_: results)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    more = ["--format", form] if form else []
    assert cli.main(["generate", "--checkpoint", str(model), "--input", str(tmp_path / "in.txt"), *more]) == 1
    said = capsys.readouterr()
    assert said.out == ("one\ntwo\nthree\n" if plain else "".join(json.dumps(result) + "\n" for result in results))
    assert "line 2: bad" in said.err


def test_both_ways_at_once_are_refused(model, capsys):
    assert cli.main(["generate", "--checkpoint", str(model), "--prefix", "a", "--no-prefix"]) == 2
    assert "contradict each other" in capsys.readouterr().err


def test_a_loaded_model_puts_its_prefix_too(model):
    loaded = load_pretrained(model)
    assert "prefix      'summarize: '" in repr(loaded)
    with pytest.MonkeyPatch.context() as patch:
        encoded = []
        patch.setattr(Vocabulary, "encode", lambda self, line: encoded.append(line) or [3])
        for options in ({}, {"prefix": ""}, {"prefix": "translate: "}):
            loaded.generate(["the fox", PREFIX + "the dog"], max_new_tokens=1, **options)
    assert encoded[:3] == [PREFIX + "the fox", PREFIX + "the dog", "the fox"]
    assert encoded[3:] == [PREFIX + "the dog", "translate: the fox", "translate: " + PREFIX + "the dog"]


def test_of_several_prefixes_none_is_put_and_all_are_named(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "mixed")
    write_prefixes(tmp_path / "mixed", ["", PREFIX, "translate: "], SwitchConfig())
    convert(str(tmp_path / "mixed"), str(tmp_path / "exported"), to="huggingface")
    transformers.GenerationConfig.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "again")
    assert read_prefixes(tmp_path / "again") == ("", PREFIX, "translate: ")
    assert load_pretrained(tmp_path / "exported").prefixes == ("", PREFIX, "translate: ")
    (tmp_path / "in.txt").write_text("the fox\n")
    argv = ["generate", "--checkpoint", str(tmp_path / "exported"), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "1"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().err
    assert "tasks with '' or 'summarize: ' or 'translate: ' before their texts" in said and "--prefix='summarize: '" in said
    for more in (["--no-prefix"], ["--prefix=translate: "]):
        assert cli.main([*argv, *more]) == 0
        assert capsys.readouterr().err == ""


def test_a_mixture_has_the_prefixes_of_its_tasks():
    config = load_recipe("finetune_summarization", ["data.prefix='summarize: '"]).resolve(SwitchConfig())
    assert config.prefixes == (PREFIX,)
    tasks = [{"name": name, "train": "x", "prefix": prefix} for name, prefix in (("a", "a: "), ("b", "b: "), ("c", "a: "))]
    recipe = load_recipe("finetune_summarization", ["data.prefix=''"]).to_dict()
    recipe["data"] |= {"tasks": tasks, "train": None, "validation": None}
    mixed = type(load_recipe("finetune_summarization")).from_dict(recipe).resolve(SwitchConfig())
    assert mixed.prefixes == ("a: ", "b: ")
