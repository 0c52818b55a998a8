"""The tests in every environment that people have: each Python with its newest and its oldest packages, and older oracles.

    python scripts/matrix.py                          # every cell that is not finished; the table at the end
    python scripts/matrix.py --only py312-newest      # one cell; --list names them
    python scripts/matrix.py --fresh                  # forget what is finished
    python scripts/matrix.py --write                  # put the table into docs/versions.md
    python scripts/matrix.py --few                    # a few fast test files for each cell: whether it can run at all
    python scripts/matrix.py constraints              # what the oldest environments hold, from setup.cfg

Environments and results live in .venv-matrix/: one folder for each cell, and results.json. What has run is kept while the package,
its recipes, tests, scripts and setup.cfg are as they were; a cell that was stopped goes on with the folder of tests it had come to.
"""

from __future__ import annotations

import argparse
import configparser
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts.run import QUICK, ROOT, pytest_part  # noqa: E402 - it lies beside this file

FOLDER = ROOT / ".venv-matrix"
DOCS = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
LEAST, NEWEST_KNOWN = (3, 11), (3, 20)  # Pythons that are looked for

TORCH = "torch==2.13.0"  # a CPU build for Python 3.11, one for CUDA of 6 GB for newer Pythons
ORACLES = {"5.24": "transformers==5.24.0", "5.23": "transformers==5.23.0", "4.57": "transformers==4.57.6"}
ORACLE_TESTS = ("tests/convert", "tests/workflows/test_finetuning_parity.py", "tests/generation", "tests/nn/test_moe.py")
OLD_ORACLE_TESTS = ("tests/convert/test_older_transformers.py",)
FEW = ("tests/test_imports.py", "tests/config/test_config.py", "tests/ops/test_losses.py", "tests/plan/test_hlo_goldens.py")
BESIDE = "tests/test_*.py"
SHOWN = ("jax", "flax", "numpy", "transformers", "torch")

# Wheels of a package that a Python needs, where they are newer than the minimum of setup.cfg.
NEWER_WHEELS: dict[str, dict[tuple[int, int], str]] = {
    "numpy": {(3, 13): "2.1.0", (3, 14): "2.3.2"},
    "sentencepiece": {(3, 13): "0.2.2"},
    "pyarrow": {(3, 13): "18.0.0", (3, 14): "22.0.0"},
    "pyyaml": {(3, 13): "6.0.2", (3, 14): "6.0.3"},
    "msgpack": {(3, 13): "1.1.0", (3, 14): "1.1.2"},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One environment: a Python, what is installed into it, and the tests that run there."""

    name: str
    python: str  # path of the interpreter
    version: tuple[int, int]
    oldest: bool = False
    packages: tuple[str, ...] = ()
    tests: tuple[str, ...] = ("tests",)


def minimums() -> dict[str, str]:
    """The least version of every package that setup.cfg names, extras included."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    found: dict[str, str] = {}
    pinned = {line.split("==")[0].strip() for line in lines if "==" in line.split(";")[0]}
    for line in lines:
        if match := re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)(?:,.*)?", line.split(";")[0].strip()):
            package, version = match.groups()
            found[package] = max(found.get(package, "0"), version, key=lambda text: [int(part) for part in text.split(".")])
    return {package: version for package, version in found.items() if package not in pinned}


def constraints() -> str:
    """Constraints of the oldest environment, with markers where a newer Python needs a newer wheel."""
    lines = ["# The minimums of setup.cfg; made by: python scripts/matrix.py constraints"]
    for package, version in sorted(minimums().items()):
        steps = sorted(NEWER_WHEELS.get(package, {}).items())
        versions = [version, *(newer for _, newer in steps)]
        for i, pinned in enumerate(versions):
            bounds = [f'python_version >= "{major}.{minor}"' for (major, minor), _ in steps[i - 1 : i]] if i else []
            bounds += [f'python_version < "{major}.{minor}"' for (major, minor), _ in steps[i : i + 1]]
            lines.append(f"{package}=={pinned}" + (f" ; {' and '.join(bounds)}" if bounds else ""))
    return "\n".join(lines) + "\n"


def pythons() -> dict[tuple[int, int], str]:
    """Every Python from 3.11 on that starts, on PATH and among pyenv's, by version."""
    names = [f"python{LEAST[0]}.{minor}" for minor in range(LEAST[1], NEWEST_KNOWN[1])] + ["python3", "python"]
    candidates = [path for name in names if (path := shutil.which(name))]
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(path) for path in sorted(home.glob("versions/3.*/bin/python"))]
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        code = "import sys; print(sys.executable, *sys.version_info[:2])"
        asked = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if asked.returncode:  # a shim of a version that is not chosen
            continue
        executable, major, minor = asked.stdout.rsplit(maxsplit=2)
        if (int(major), int(minor)) >= LEAST:
            found.setdefault((int(major), int(minor)), executable)
    return dict(sorted(found.items()))


def cells(found: dict[tuple[int, int], str]) -> list[Cell]:
    """The matrix: newest and oldest for each Python, and each oracle on the oldest Python, where torch is smallest."""
    table = []
    for version, python in found.items():
        name = f"py{version[0]}{version[1]}"
        table += [Cell(f"{name}-newest", python, version), Cell(f"{name}-oldest", python, version, oldest=True)]
    for release, package in ORACLES.items():
        version = min(found)
        tests = OLD_ORACLE_TESTS if release.startswith("4") else ORACLE_TESTS
        table.append(Cell(f"transformers-{release}", found[version], version, packages=(TORCH, package), tests=tests))
    return table


def install(cell: Cell) -> Path:
    """The interpreter of the cell's environment, which is made where it is not there yet."""
    home = FOLDER / cell.name
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256((constraints() + (ROOT / "setup.cfg").read_text() + repr(cell)).encode()).hexdigest()
    stamp = home / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"== {cell.name}: installing", flush=True)
    subprocess.run([cell.python, "-m", "venv", "--clear", str(home)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", ".[test-without-torch]"]
    if cell.oldest:
        (home / "constraints.txt").write_text(constraints())
        command += ["-c", str(home / "constraints.txt")]
    subprocess.run([*command, *cell.packages], cwd=ROOT, check=True)
    stamp.write_text(wanted)
    return python


def places(cell: Cell, few: bool) -> list[str]:
    """What of the cell's tests pytest is given at a time: folders of tests, and the files beside them, in a fixed order."""
    wanted = (FEW if cell.tests == ("tests",) else cell.tests) if few else cell.tests
    if wanted != ("tests",):
        return [place for place in wanted if (ROOT / place).exists()]
    inner = {file.relative_to(ROOT / "tests").parts[0] for file in (ROOT / "tests").glob("*/**/test_*.py")}
    return [*(f"tests/{name}" for name in sorted(inner)), BESIDE]


def run_place(cell: Cell, python: Path, place: str) -> dict[str, object]:
    """Counts and seconds of the quick tests at one place, and the names of what failed."""
    files = sorted(map(str, (ROOT / "tests").glob("test_*.py"))) if place == BESIDE else [place]
    part = pytest_part(f"{cell.name}: {place}", QUICK, ["-q", "-p", "no:cacheprovider", *files], python=str(python))
    failed = part.failed or ([] if part.ok else [f"{place}: pytest could not run"])
    counts = {"passed": part.outcomes["passed"], "skipped": part.outcomes["skipped"]}
    return {**counts, "failed": failed, "seconds": round(part.minutes * 60, 1)}


def tree() -> str:
    """A hash of all that the tests' outcomes hang on."""
    text = hashlib.sha256((ROOT / "setup.cfg").read_bytes())
    for folder in ("flax_switch", "configs", "tests", "scripts"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                text.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return text.hexdigest()


def installed_versions(python: Path) -> dict[str, str]:
    """Versions of the packages that the table shows."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "known = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        f"print(json.dumps({{'python': sys.version.split()[0], **{{n: known.get(n, '-') for n in {SHOWN!r}}}}}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


def run_cell(cell: Cell, results: dict, few: bool) -> None:
    """Runs what is left of the cell and keeps every finished place in results.json."""
    key, now = f"{cell.name}-few" if few else cell.name, tree()
    if results.get(key, {}).get("tree") != now:
        results[key] = {"tree": now, "places": {}}
    entry = results[key]
    try:
        python = install(cell)
    except subprocess.CalledProcessError as error:
        entry["problem"] = f"does not install (status {error.returncode})"
        return save(results)
    entry.pop("problem", None)
    entry["versions"] = installed_versions(python)
    for place in places(cell, few):
        if place not in entry["places"]:
            entry["places"][place] = run_place(cell, python, place)
            save(results)
            counts = totals([entry["places"][place]])
            print("   {}  {}: {} passed, {} failed, {} skipped".format(cell.name, place, *counts), flush=True)
    return None


def save(results: dict) -> None:
    """Writes results.json."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def totals(ran: list[dict]) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped."""
    return sum(one["passed"] for one in ran), sum(len(one["failed"]) for one in ran), sum(one["skipped"] for one in ran)


def table(results: dict) -> str:
    """The results as a table in Markdown."""
    head = ["cell", "Python", *SHOWN, "passed", "failed", "skipped", "minutes"]
    rows = [head, ["---"] * len(head)]
    for name, entry in results.items():
        versions, ran = entry.get("versions", {}), list(entry["places"].values())
        minutes = f"{sum(one['seconds'] for one in ran) / 60:.1f}"
        outcome = [*map(str, totals(ran)), minutes] if "problem" not in entry else [entry["problem"], "", "", ""]
        rows.append([name, versions.get("python", "-"), *(versions.get(package, "-") for package in SHOWN), *outcome])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def resolution(version: str, python: str) -> str:
    """What pip would install for a Python that is not here: whether there is a wheel of everything.

    python: the newest interpreter there is. pip refuses what asks for a newer Python than its own, whatever it resolves for.
    """
    with_pip = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    foreign = ["--only-binary=:all:", "--python-version", version, "--implementation", "cp", "--target", str(FOLDER / "none")]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"].split()
    ran = subprocess.run([*with_pip, *foreign, *wanted], capture_output=True, text=True, check=False)
    if ran.returncode:
        return f"Python {version}: does not resolve: {ran.stderr.strip().splitlines()[-1]}"
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(ran.stdout)["install"]}
    shown = ", ".join(f"{package} {found[package]}" for package in SHOWN if package in found)
    return f"Python {version}: wheels of all {len(found)} packages ({shown}); resolved, not run."


def write(text: str) -> None:
    """Puts the table between its markers in docs/versions.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "constraints", "table"), default="run")
    parser.add_argument("--only", action="append", default=[], metavar="CELL", help="run these cells alone")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    parser.add_argument("--few", action="store_true", help="a few fast test files for each cell")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    return parser.parse_args()


def main() -> int:
    """Exit status 0 where no cell failed."""
    args = parse()
    if args.what == "constraints":
        print(constraints(), end="")
        return 0
    found = pythons()
    chosen = [cell for cell in cells(found) if not args.only or cell.name in args.only]
    if args.list or not chosen:
        print("\n".join(f"{cell.name:<20} {cell.python}" for cell in cells(found)))
        return 0 if args.list else 2
    kept = FOLDER / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    if args.fresh:
        results = {name: entry for name, entry in results.items() if args.only and name not in args.only}
    if args.what == "run":
        for cell in chosen:
            run_cell(cell, results, args.few)
    text = table(results) + "".join(f"\n{resolution('3.14', found[max(found)])}\n" for _ in range((3, 14) not in found))
    print(text)
    if args.write:
        write(text)
    return int(any("problem" in entry or any(one["failed"] for one in entry["places"].values()) for entry in results.values()))


if __name__ == "__main__":
    sys.exit(main())
