"""Types hold at run time, in every test, and to the type checkers of those who use the package."""

import ast
import configparser
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import typechecking

import flax_switch as fs
from flax_switch import config
from flax_switch.config import base, distillation, finetuning
from flax_switch.nn.layers import RMSNorm
from flax_switch.nn.outputs import EncoderOutput
from flax_switch.ops.moe.routing import router_z_loss

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flax_switch"
MODULES = [path for name in typechecking.CHECKED for path in sorted((ROOT / name.replace(".", "/")).rglob("*.py"))]
CONFIGS = {
    value.__name__: value
    for module in (config, finetuning, distillation)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, base._Section) and dataclasses.fields(value)
}


# --- at run time
def test_a_function_refuses_an_array_of_another_shape_or_kind():
    with pytest.raises(jaxtyping.TypeCheckError, match="router_z_loss"):
        router_z_loss(jnp.zeros((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError, match="counted"):
        router_z_loss(jnp.zeros((1, 2, 3)), jnp.ones((1, 3), bool))  # S is 2
    with pytest.raises(jaxtyping.TypeCheckError, match="router_z_loss"):
        router_z_loss(jnp.zeros((1, 2, 3), int))


def test_a_module_refuses_what_its_call_does_not_take():
    norm = RMSNorm(fs.SwitchConfig(d_model=4))
    with pytest.raises(jaxtyping.TypeCheckError, match="RMSNorm"):
        norm.init(jax.random.key(0), jnp.zeros((2, 4), int))
    with pytest.raises(jaxtyping.TypeCheckError, match="RMSNorm"):
        RMSNorm(4)


def test_a_struct_refuses_arrays_that_do_not_fit_but_may_hold_anything_inside_a_tree_function():
    with pytest.raises(jaxtyping.TypeCheckError, match="last_hidden_state"):
        EncoderOutput(jnp.zeros((2, 3)))
    output = EncoderOutput(jnp.zeros((2, 3, 4)))
    assert jax.tree.map(lambda x: x.shape, output).last_hidden_state == (2, 3, 4)
    assert jax.vmap(EncoderOutput)(jnp.zeros((5, 2, 3, 4))).last_hidden_state.shape == (5, 2, 3, 4)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_annotation_is_text_which_would_go_unchecked(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    arguments = [a for f in functions for a in ast.walk(f.args) if isinstance(a, ast.arg)]
    fields = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    annotations = [f.returns for f in functions] + [node.annotation for node in (*arguments, *fields)]
    assert not [ast.unparse(a) for a in annotations if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    assert "annotations" not in {n.name for node in tree.body if isinstance(node, ast.ImportFrom) for n in node.names}


def test_arrays_of_different_ranks_are_not_broadcast_silently():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)


# --- configs
@pytest.mark.parametrize("section", CONFIGS.values(), ids=CONFIGS)
def test_a_mistyped_keyword_of_any_config_is_an_error_that_names_the_nearest(section):
    field = dataclasses.fields(section)[0].name
    with pytest.raises(fs.ConfigError, match=f"{section.__name__} has no field '{field}x'. Did you mean '{field}'"):
        section(**{f"{field}x": 1})


def test_the_nearest_name_is_found_in_the_issue_of_every_beginner():
    with pytest.raises(fs.ConfigError, match=r"Did you mean 'num_experts'\?"):
        fs.SwitchConfig(num_expert=3)


# --- for type checkers
def test_the_names_that_are_loaded_lazily_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == fs._HOME
    assert set(fs.__all__) == {*seen, "__version__"}
    assert fs.__all__ == sorted(fs.__all__)


def test_every_public_name_is_used_in_the_file_that_is_checked_strictly():
    text = (Path(__file__).parent / "typing" / "public_names.py").read_text()
    assert [name for name in fs.__all__ if f"fs.{name}" not in text] == []


@pytest.fixture
def wrong(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("import flax_switch as fs\nfs.SwitchConfig(num_expert=3)\n")
    return path


def test_pyright_reports_a_wrong_keyword(wrong):
    pytest.importorskip("basedpyright")
    settings = {"include": [wrong.name], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (wrong.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", str(wrong.parent), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'wrong.py:2:17 - error: No parameter named "num_expert"' in done.stdout


def test_mypy_reports_a_wrong_keyword(wrong):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    ini = configparser.ConfigParser()  # other libraries say nothing about our keywords, and take long to read
    ini["mypy"] = {"mypy_path": str(ROOT), "follow_imports": "skip", "ignore_missing_imports": "true"}
    ini["mypy-flax_switch.*"] = {"follow_imports": "silent"}
    with (wrong.parent / "mypy.ini").open("w") as file:
        ini.write(file)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", wrong.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=wrong.parent)
    assert done.returncode == 1
    assert 'wrong.py:2: error: Unexpected keyword argument "num_expert" for "SwitchConfig"' in done.stdout
