"""What a run was made with, for its report: a line in sessions.jsonl when training starts, another when it ends."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath

from flax_switch.config import ConfigError
from flax_switch.host.files import read_bytes, write_text
from flax_switch.host.json_text import field, json_object

SESSIONS_FILE = "sessions.jsonl"
_PACKAGES = ("flax_switch", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Session:
    """A stretch of training from a start to an end; one that was killed has no end. The first of several processes writes."""

    def __init__(self, workdir: epath.PathLike, step: int, data: list[dict[str, Any]]) -> None:
        """Notes the start, at a step, with what the data is."""
        self._path, self._writes = epath.Path(workdir) / SESSIONS_FILE, jax.process_index() == 0
        self._add({"event": "start", "step": step, "time": now(), "command": command(), **surroundings(), "data": data})

    def end(self, step: int) -> None:
        """Notes the end."""
        self._add({"event": "end", "step": step, "time": now()})

    def _add(self, line: dict[str, Any]) -> None:
        if self._writes:
            lines = [*read_sessions(self._path.parent), line]
            write_text(self._path, "".join(json.dumps(one) + "\n" for one in lines))


def read_sessions(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a workdir's sessions; a run of an earlier version has none."""
    path = epath.Path(workdir) / SESSIONS_FILE
    found = []
    for text in read_bytes(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ConfigError):
            line = json_object(text, SESSIONS_FILE)
            for name in ("event", "time"):
                field(line, name, str, SESSIONS_FILE)
            found.append(line)
    return found


def now() -> str:
    """Returns the time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command() -> str:
    """Returns what started this process, as one would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["flax-switch" if name in ("__main__.py", "flax-switch") else name or "python", *sys.argv[1:]])


def surroundings() -> dict[str, Any]:
    """Returns what a run computes on and with: devices, host, versions."""
    devices = jax.devices()
    return {
        "devices": len(devices),
        "device": devices[0].device_kind,
        "processes": jax.process_count(),
        "host": f"{_cpu()}, {os.cpu_count()} logical CPUs, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """Returns an installed package's version, or None."""
    if package == "flax_switch":
        import flax_switch

        return flax_switch.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.environ.get("PROCESSOR_IDENTIFIER", "CPU")
