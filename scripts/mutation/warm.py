"""Children of a warm process: pytest, JAX and Flax are imported once, and every run is a fork that imports flax_switch afresh."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HEAVY = (
    "jax", "jax.experimental.pallas", "flax.linen", "optax", "orbax.checkpoint", "grain", "sentencepiece", "tensorstore",
    "safetensors", "ml_collections", "absl.flags", "rich", "torch", "transformers", "matplotlib", "pyarrow", "scipy.stats",
    "beartype",
)  # fmt: skip


def warm_up(root: Path, xla_cache: Path) -> None:
    """Sets the environment of the tests and imports what is slow to import, but no part of flax_switch, and starts no backend."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(xla_cache)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant may have the size and the second of the file before it
    sys.dont_write_bytecode = True
    os.environ.update(environment_of_the_tests(root / "tests"))
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] == "flax_switch"]
    assert not loaded, f"the warm process must not hold flax_switch, or mutants would not be read: {loaded}"


def environment_of_the_tests(tests: Path) -> dict[str, str]:
    """The environment as the suite's conftest leaves it, which another process tells: here nothing of the tests is imported."""
    program = "import conftest, json, os; print(json.dumps(dict(os.environ)))"
    path = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-W", "ignore", "-c", program]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}).stdout)


def start(task: Callable[[], int], tree: Path, log: Path) -> int:
    """Forks a child, in its own session, that runs the task in the tree and ends with its status; returns the child's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        status = task()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, deadline: float) -> int | None:
    """The child's status, None while it runs; a child that is past its deadline is killed, and its status is -9."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        kill_group(child)  # what it started ends with it
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() < deadline:
        return None
    kill_group(child)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def kill_group(child: int) -> None:
    """Kills whatever is left of a child's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


@contextlib.contextmanager
def killed_at_the_end() -> Iterator[set[int]]:
    """A set for running children, which are killed if the block is left while they run."""
    children: set[int] = set()
    try:
        yield children
    finally:
        for child in children:
            kill_group(child)
