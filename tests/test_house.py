"""What holds the house together: one room that knows the platform, plain English, files and functions of a size to read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flax_switch"
MODULES = sorted(PACKAGE.rglob("*.py"))
PLATFORM = re.compile(r"platform_dependent|default_backend|(?<!sys)\.platform\b")
KNOWS_PLATFORMS = ("ops/kernels/", "host/", "plan/")  # kernels; the operating system; topologies that are described


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_kernels_ask_for_the_platform(path):
    if not str(path.relative_to(PACKAGE)).startswith(KNOWS_PLATFORMS):
        assert not PLATFORM.findall(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_of_a_size_to_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    if path.parent.name == "commands" or path.name == "cli.py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert lines <= 60, f"{node.name} has {lines} lines besides its docstring"
