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
    "presets": {"config"},
    "config_huggingface": {"config"},
    "config_finetuning": {"config"},
    "config_distillation": {"config"},
    "shipped": {"config"},
    "sizes": {"config"},
    "recipes": {"config", "config_distillation", "config_finetuning", "shipped"},
    "partitioning": {"config"},
    "distributed": {"config"},
    "compilers": set(),
    "host_memory": {"compilers"},
    "data": {"config", "config_finetuning"},
    "ops": {"compilers", "config", "partitioning"},
    "nn": {"config", "ops", "partitioning"},
    "convert": {"config", "config_huggingface", "data", "nn"},
    "generation": {"config", "ops", "nn", "data", "partitioning", "convert"},
    "pretrained": {"config", "data", "ops", "nn", "partitioning", "convert", "generation", "huggingface_outputs"},
    "huggingface_outputs": {"config", "config_huggingface", "ops", "nn"},
    "training": {"config", "config_distillation", "config_finetuning", "distributed", "data", "ops", "nn", "partitioning"}
    | {"generation", "convert", "pretrained"},
    "finetuning": {"config", "config_finetuning", "presets", "data", "partitioning", "generation", "convert"}
    | {"pretrained", "training"},
    "plan": {"compilers", "config", "data", "ops", "nn", "partitioning", "generation", "training"},
    "explore": {"config", "data", "ops", "nn", "pretrained"},
}
LAZY = {"config": {"config_huggingface"}}  # inside a function, to keep the module light


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
    extra = imports(path) - ALLOWED[part] - LAZY.get(part, set()) - {part}
    assert not extra, f"{path.name} imports {extra}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flax_switch", ("jax", "torch", "transformers", "matplotlib", "tensorflow")),
        ("flax_switch.config", ("jax", "numpy")),
        ("flax_switch.data", ("jax", "flax", "torch")),
        ("flax_switch.training.loop", ("torch", "transformers", "matplotlib")),
        ("flax_switch.cli", ("jax", "torch")),
    ],
)
def test_heavy_libraries_are_not_loaded(module, absent):
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert output.stdout.split() == []
