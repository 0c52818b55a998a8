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


# What a stranger would have to translate, and what is written in its place.
DIALECT = {
    r"\bprocessors?\b": "CPU",
    r"grouped products?\b": "grouped GEMM",
    r"no filling of": "padding of the last group",
    r"(?<=\"\"\")Of |(?<=help=\")Of |(?<=[.;:] )Of [a-z`]|(?<=# )Of [a-z`]": "a sentence that begins with its subject",
    r"_kernels_kernel|grouped_kernels|as_there|\bteachers\b|missing_extra\b": "a name that says what it is",
    r"\bTOGETHER\b|\b_turn\b|\b_me\b|\b_say\b|\b_GO_ON\b": "a name that says what it is",
}
ANSWERS = re.compile(r"\banswer", re.IGNORECASE)  # experts have outputs
PROSE = [
    *MODULES,
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "configs").rglob("*.py"),
    *(ROOT / "scripts").glob("*.py"),
]


@pytest.mark.parametrize("path", sorted(PROSE), ids=lambda path: str(path.relative_to(ROOT)))
def test_it_is_written_in_plain_english(path):
    text = path.read_text()
    for pattern, instead in DIALECT.items():
        assert not re.findall(pattern, text), f"write {instead}"
    if path.parts[-2] in ("moe", "kernels", "nn") or path.name in ("moe.md", "parallelism.md", "architecture.md"):
        assert not ANSWERS.findall(text), "experts have outputs"


NOUNS = ("The", "A", "An", "Which", "Whether", "How", "What", "Who", "Of")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_functions_docstring_begins_with_what_it_does(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any("property" in ast.unparse(d) for d in node.decorator_list):
            words = (ast.get_docstring(node) or "").split()
            assert not words or words[0] not in NOUNS, f"{node.name}: {' '.join(words[:8])}"


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
