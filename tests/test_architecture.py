"""docs/architecture.md says what is there: the drawing, every function and test it names; the glossary has the letters of ops."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

import flax_switch.ops

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`(?!tests/)([a-z_]+(?:/[a-z0-9_]+)+|cli)\.([A-Za-z_]+(?:\.[a-z_]+)?)`", PAGE)))


@functools.cache
def names_of(module):
    """What a module defines, and `Class.member` of its classes."""
    found = set()
    for node in ast.parse((ROOT / "flax_switch" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{member.name}" for member in getattr(node, "body", ()) if isinstance(member, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_the_drawing_is_that_of_the_imports():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts" / "draw_architecture.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert drawing.page() == PAGE, "run python scripts/draw_architecture.py"


@pytest.mark.parametrize(("module", "name"), NAMED, ids=str)
def test_every_function_that_the_page_names_is_there(module, name):
    assert name in names_of(module)


def test_every_module_and_test_that_the_page_names_is_there():
    assert len(NAMED) > 60
    for module in re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)+)`", PAGE):
        assert (ROOT / "flax_switch" / f"{module}.py").exists() or (ROOT / "flax_switch" / module).is_dir(), module
    for test in re.findall(r"`(tests/[a-z0-9_/.]+)`", PAGE):
        assert (ROOT / test).exists(), test


def test_the_glossary_has_the_letters_of_ops():
    letters = dict(re.findall(r"^\| ([A-Z]) \| (.*) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE))
    said = re.findall(r"\b([A-Z]) ([a-zA-Z_]+(?: [a-z]+)*?)(?= {2,}|\n| \()", flax_switch.ops.__doc__)
    assert len(said) == 12
    for letter, meaning in said:
        assert letters[letter].startswith(meaning), letter
