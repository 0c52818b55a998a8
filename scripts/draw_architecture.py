"""Draws the packages of flax_switch and their imports as a Mermaid diagram in docs/architecture.md.

    python scripts/draw_architecture.py            # writes the diagram between its two marks
    python scripts/draw_architecture.py --check    # exit status 1 where the page is not current

An arrow says "imports". An import that follows from others is left out: where A imports B and B imports C, A may import C.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by scripts/draw_architecture.py -->", "<!-- end of the drawing -->"


def imports() -> dict[str, set[str]]:
    """Returns which packages each package imports; `cli` and `commands` are one."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "flax_switch").rglob("*.py"):
        parts = path.relative_to(ROOT / "flax_switch").parts
        if len(parts) == 1 and parts[0] != "cli.py":
            continue
        own = found.setdefault(package_of(parts), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax_switch."):
                own.add(package_of(tuple((node.module or "").split(".")[1:])))
    return {package: others - {package} for package, others in found.items()}


def package_of(parts: tuple[str, ...]) -> str:
    """Returns the package that a module belongs to."""
    name = parts[0].removesuffix(".py")
    if parts[:2] == ("ops", "kernels"):
        return "ops/kernels"
    return "commands" if name == "cli" else name


def reachable(package: str, found: dict[str, set[str]]) -> set[str]:
    """Returns what a package imports, directly or through others."""
    return found[package].union(*(reachable(other, found) for other in found[package]))


def diagram() -> str:
    """Returns the Mermaid text, the highest package first."""
    found = imports()
    lines = ["```mermaid", "flowchart TD"]
    for package in sorted(found, key=lambda package: (-len(reachable(package, found)), package)):
        through: set[str] = set().union(*(reachable(other, found) for other in found[package]))
        node = package.replace("/", "_")
        lines.append(f'    {node}["{package}"]')
        lines += [f"    {node} --> {other.replace('/', '_')}" for other in sorted(found[package] - through)]
    return "\n".join([*lines, "```"])


def page() -> str:
    """Returns the page with the diagram that the imports give."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{diagram()}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not current")
    if parser.parse_args().check:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
