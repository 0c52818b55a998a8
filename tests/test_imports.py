"""Imports point one way, and heavy libraries load only where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flax_switch"

# What each part may import of ours, besides itself.
ALLOWED = {
    "config": set(),
    "host": {"config"},
    "parallel": {"config", "host"},
    "ops": {"config", "host", "parallel"},
    "nn": {"config", "host", "ops", "parallel"},
    "data": {"config", "host"},
    "convert": {"config", "data", "host"},
    "generation": {"config", "convert", "host", "nn", "ops", "parallel"},
    "training": {"config", "data", "host", "nn", "ops", "pages", "parallel"},
    "pretrained": {"config", "convert", "data", "generation", "host", "nn", "ops", "parallel"},
    "plan": {"config", "generation", "host", "nn", "ops", "parallel", "training"},
    "pages": {"config"},
    "export": {"config", "convert", "generation", "host", "nn", "ops", "parallel"},
    "inspection": {"config", "convert", "data", "host", "nn", "ops", "pages", "pretrained", "training"},
    "serving": {"config", "convert", "data", "generation", "host", "inspection", "nn", "ops", "pages", "pretrained"},
    "workflows": {"config", "convert", "data", "generation", "host", "nn", "ops", "pages", "parallel", "pretrained", "training"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flax_switch":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("flax_switch.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part in ("__init__", "__main__", "cli", "commands"):
        return  # the top: they may import everything
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    extra = imports(path) - ALLOWED[part] - {part}
    assert not extra, f"{path.name} imports {extra}"


def test_no_package_imports_itself_through_others():
    floor = {}
    while len(floor) < len(ALLOWED):
        ready = [part for part, below in ALLOWED.items() if part not in floor and below <= floor.keys()]
        assert ready, f"an import circle among {ALLOWED.keys() - floor.keys()}"
        floor |= dict.fromkeys(ready, 1 + max(floor.values(), default=0))


def test_only_the_command_line_is_a_module_at_the_root():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flax_switch", ("jax", "torch", "transformers", "matplotlib", "tensorflow")),
        ("flax_switch.config", ("jax", "numpy")),
        ("flax_switch.data", ("jax", "flax", "torch")),
        ("flax_switch.training.loop", ("torch", "transformers", "matplotlib")),
        ("flax_switch.workflows.pretrain", ("torch", "transformers", "matplotlib")),
        ("flax_switch.cli", ("jax", "torch")),
        ("flax_switch.export.folder", ("torch", "transformers", "jax2onnx", "ctranslate2")),
        ("flax_switch.commands.serve", ("jax", "starlette", "uvicorn")),
    ],
)
def test_heavy_libraries_are_not_loaded(module, absent):
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert output.stdout.split() == []
