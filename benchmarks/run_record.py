"""Writes what one run of a benchmark measured, with all that is needed to judge and to repeat it.

A file under `results/` is made by one run and never merged: {"about": {...}, ...what the script measured}. `about` holds the
command, the date, the versions, the CPU with the extensions that matter for speed, the device of the programs where it is not this
CPU alone, and the load of the machine when the run began and when it ended.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "grain", "sentencepiece", "libtpu",
    "jax-cuda13-plugin", "torch", "transformers", "ctranslate2",
)  # fmt: skip
EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")


def load() -> list[float] | None:
    """Returns the processes that wanted to run in the last 1, 5 and 15 minutes; None where the system does not say."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


_START, _BEGAN, _LOAD_BEFORE = datetime.datetime.now().astimezone(), time.perf_counter(), load()


def peak_bytes() -> int:
    """Returns the most memory that this process has held, as Linux says (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def processor() -> dict[str, Any]:
    """Returns the CPU's name, the cores that this process may use, and which of `EXTENSIONS` it has."""
    described, path = {}, Path("/proc/cpuinfo")
    if path.exists():
        pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
        described = {name.strip(): value.strip() for name, _, value in pairs}
    flags = described.get("flags", described.get("Features", "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": described.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": cores,
        "extensions": [flag for flag in EXTENSIONS if flag in flags],
    }


def versions() -> dict[str, str]:
    """Returns Python's version and those of the installed packages that can change a figure."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(path: str | Path, results: dict[str, Any], *, device: str | None = None, quiet: bool = False) -> None:
    """Writes `results` and what is known about this run as JSON to `path`, in place of what was there.

    device: what the programs ran on or were compiled for, where that is not this machine's CPU alone. quiet: say nothing, as of a
    run that goes on.
    """
    path = Path(path)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    about = {
        "command": command,
        "date": _START.date().isoformat(),
        "seconds": round(time.perf_counter() - _BEGAN, 1),
        "versions": versions(),
        "processor": processor(),
        **({"device": device} if device else {}),
        "load_before": _LOAD_BEFORE,
        "load_after": load(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, **results}, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"Wrote {path}.")
