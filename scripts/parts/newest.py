"""A quick subset of the tests on the newest JAX there is, in an environment of its own that holds no PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

from parts.run import NEWEST_TESTS, QUICK, ROOT, pytest_part, say
from parts.table import Part

OLDEST_PYTHON = (3, 12)  # for which the newest JAX is made
FOLDER = ROOT / ".venv-newest"


def newest_part(extra: list[str]) -> Part:
    """Runs the subset; where there is no Python that is new enough, the part says so and has not failed."""
    name = "quick subset, newest JAX"
    python = newest_python()
    if python is None:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Part(name, note=f"NOT RUN: there is no Python >= {wanted} on PATH or in ~/.pyenv/versions; install one to run it")
    installed = _environment(python)
    if installed is None:
        return Part(name, ok=False, note=f"pip could not install flax_switch[test-core] for {python}; see {FOLDER / 'pip.log'}")
    extra = extra if any(not argument.startswith("-") for argument in extra) else [*NEWEST_TESTS, *extra]
    part = pytest_part(name, f"{QUICK} and not torch", extra, python=str(FOLDER / "bin" / "python"))
    part.note = f"{installed} {part.note}".strip()
    return part


def newest_python() -> Path | None:
    """The newest Python that there is, by what each says of itself."""
    named = [shutil.which(f"python3.{minor}") for minor in range(OLDEST_PYTHON[1], 30)]
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python")
    found = {}
    for python in [*filter(None, named), *map(str, of_pyenv)]:
        version = _version(python)
        if version is not None and version >= OLDEST_PYTHON:
            found.setdefault(version, Path(python))
    return found[max(found)] if found else None


def _version(python: str) -> tuple[int, ...] | None:
    """(major, minor, micro), None where it does not run, is no release, or cannot make environments."""
    program = "import ensurepip, json, sys, venv; print(json.dumps(sys.version_info[:4]))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    if done.returncode:
        return None
    *version, level = json.loads(done.stdout)
    return tuple(version) if level == "final" else None


def _environment(python: Path) -> str | None:
    """Makes the environment unless it is there; returns its versions, None where pip failed."""
    settings = (ROOT / "setup.cfg").read_bytes() + (ROOT / "setup.py").read_bytes() + str(python).encode()
    stamp = FOLDER / f"installed-{zlib.crc32(settings)}"
    inner = str(FOLDER / "bin" / "python")
    if not stamp.is_file():
        say(f"Installing flax_switch[test-core] with {python} into {FOLDER.name}")
        subprocess.run([str(python), "-m", "venv", "--clear", str(FOLDER)], check=True)
        with (FOLDER / "pip.log").open("w") as log:
            command = [inner, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[test-core]"]
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode:
                return None
        stamp.touch()
    program = (
        "import sys, jax, flax, numpy; print(f'Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}')"
    )
    return subprocess.run([inner, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
