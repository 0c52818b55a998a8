"""Recipes load, from Python and from gin, and overrides change what they name."""

import shutil
import typing
from pathlib import Path

import pytest

from flax_switch.config import ConfigError
from flax_switch.config.base import _Section
from flax_switch.config.kinds import RECIPES
from flax_switch.config.recipes import SECTIONS, load_gin, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_says_how_to_run_it(name):
    path = CONFIGS / f"{name}.py"
    load_recipe(path)
    text = path.read_text().split('"""')[1]
    for part in (f"--config configs/{name}.py", "Hardware:", "Expect:"):
        assert part in text


@pytest.mark.parametrize("name", NAMES)
def test_gin_files_describe_the_same_runs(name):
    assert load_gin([CONFIGS / "gin" / f"{name}.gin"]) == load_recipe(CONFIGS / f"{name}.py")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_same_wherever_its_file_lies(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / f"{name}.py", tmp_path / "mine.py")
    assert load_recipe("mine.py") == load_recipe(name) == load_recipe(CONFIGS / f"{name}.py")


def test_a_recipe_of_ones_own_inherits_from_one_that_comes_with_the_package(tmp_path):
    path = tmp_path / "wide.py"
    path.write_text(
        "from flax_switch.config.recipes import load_recipe, to_config_dict\n"
        "def get_config():\n"
        "    base = load_recipe('tiny')\n"
        "    return to_config_dict(base.replace(model=base.model.replace(d_ff=1024)))\n"
    )
    tiny = load_recipe("tiny")
    assert load_recipe(path) == tiny.replace(model=tiny.model.replace(d_ff=1024))


def test_every_section_of_every_kind_can_be_named():
    hints = [typing.get_type_hints(recipe) for recipe in RECIPES.values()]
    found = {name for one in hints for name, hint in one.items() if isinstance(hint, type) and issubclass(hint, _Section)}
    assert found | {"model"} == set(SECTIONS)


def test_overrides_and_bindings_agree():
    python = load_recipe(
        CONFIGS / "tiny.py", ["train.steps=7", "model.num_experts=4", "data.source=('a', 'b')", "data.shuffle=false"]
    )
    gin = load_gin(
        [CONFIGS / "gin" / "tiny.gin"],
        ["train.steps = 7", "model.num_experts = 4", "data.source = ('a', 'b')", "data.shuffle = False"],
    )
    assert python == gin
    assert (python.train.steps, python.model.num_experts, python.data.source) == (7, 4, ("a", "b"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=7", "Did you mean 'steps'"),
        ("trian.steps=7", "Did you mean 'train'"),
        ("train=7", "write section.field"),
        ("train.steps", "has no '='"),
        ("train.steps=soon", "must be int; it is 'soon'"),
        ("model.num_experts=2.5", "must be int"),
        (f"optimizer.learning_rate=1{'0' * 400}", "optimizer.learning_rate must be a number that a float can hold"),
    ],
    ids=lambda text: text[:30],
)
def test_bad_overrides_are_errors_that_say_what_was_meant(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(CONFIGS / "tiny.py", [override])


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(ConfigError, match="tiny"):
        load_recipe(CONFIGS / "tinny.py")


def test_bad_gin_files_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="no gin file"):
        load_gin([tmp_path / "none.gin"])
    path = tmp_path / "a.gin"
    path.write_text("train.steps = 5\n")
    with pytest.raises(ConfigError, match="recipe.base"):
        load_gin([path])
    path.write_text(f"recipe.base = '{CONFIGS / 'tiny.py'}'\ntrain.stepps = 5\n")
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        load_gin([path])
    path.write_text("trian.steps = 5\n")
    with pytest.raises(ConfigError, match="trian"):
        load_gin([path])


@pytest.mark.parametrize(
    "text",
    [
        "from __gin__ import dynamic_registration\n",
        "import t5x\n",
        "include 't5x/configs/runs/pretrain.gin'\n",
        "train.steps = @nowhere()\n",
    ],
    ids=["dynamic registration", "import", "include", "a reference"],
)
def test_gin_files_of_t5x_are_one_message(text, tmp_path):
    (tmp_path / "a.gin").write_text(text + "recipe.base = 'tiny'\n")
    with pytest.raises(ConfigError, match=r"(?s)cannot be read: .*T5X's own files"):
        load_gin([tmp_path / "a.gin"])
    assert load_gin(["tiny"]) == load_recipe("tiny"), "nothing of it stays"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('x')\n", "a.py, line 1 raises KeyError: 'x'"),
        ("import sys\nsys.exit('enough')\n", "a.py, line 2 raises SystemExit: enough"),
        ("def get_config():\n    return 1 / 0\n", "a.py, line 2 raises ZeroDivisionError"),
        ("def get_config(:\n", "raises SyntaxError"),
        ("def get_config():\n    return {'model': 1}\n", "returns dict, not to_config_dict"),
        ("import nowhere_at_all\n", "raises ModuleNotFoundError"),
    ],
)
def test_whatever_a_recipe_raises_is_one_message(code, message, tmp_path):
    (tmp_path / "a.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "a.py")


@pytest.mark.parametrize("text", ["train.steps.foo=3", "train=3", "train.=3"])
def test_an_override_below_a_field_is_one_message(text):
    with pytest.raises(ConfigError, match="names no field; write section.field"):
        load_recipe("tiny", [text])


def test_a_value_that_is_no_literal_is_text():
    assert load_recipe("tiny", ["data.source={[]: 1}"]).data.source == "{[]: 1}"
