"""What a run writes down: metrics.jsonl, one line per logged step, which trackers are told, too."""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_switch.config import ConfigError
from flax_switch.host.files import in_store, read_bytes, write_text
from flax_switch.host.json_text import field, json_object

METRICS_FILE = "metrics.jsonl"
_LARGEST = 1 << 32  # bytes of it


def plain(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested metrics of arrays as one flat dict of floats and lists, read from the device in one go."""
    flat = {}
    for name, value in jax.device_get(metrics).items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            flat.update(plain(value, f"{key}/"))
        else:
            flat[key] = np.asarray(value, np.float64).tolist()
    return flat


class MetricsWriter:
    """Appends to a workdir's metrics. Lines after `resume_step` are dropped first: the run will write them again.

    Of several processes only the first writes. On a disk every line is there at once; in object storage, where nothing can be
    appended, after `flush` and `close`. `trackers` are called with each line's step, kind and metrics (`training.trackers`).
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0, trackers: Sequence[Callable[..., object]] = ()):
        self._trackers, self._writes = trackers, jax.process_index() == 0
        if not self._writes:
            return
        self._path = epath.Path(workdir) / METRICS_FILE
        self._stored = in_store(self._path)
        self._lines = [json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= resume_step]
        write_text(self._path, "".join(self._lines))

    def write(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """Writes one line {"step", "kind", ...}; `kind` is "train", "eval" or "final"."""
        if not self._writes:
            return
        line = json.dumps({"step": step, "kind": kind, **metrics}) + "\n"
        if self._stored:
            self._lines.append(line)
        else:
            with self._path.open("a") as file:
                file.write(line)
        for tracker in self._trackers:
            tracker(step, kind, metrics)

    def flush(self) -> None:
        """Writes what is held back; call it before a checkpoint is saved, so that no checkpoint is ahead of the metrics."""
        if self._writes and self._stored:
            write_text(self._path, "".join(self._lines))

    def close(self) -> None:
        """Flushes all that is held back."""
        self.flush()
        for tracker in self._trackers:
            getattr(tracker, "close", lambda: None)()


def read_metrics(workdir: epath.PathLike) -> Iterable[dict[str, Any]]:
    """Returns the lines of a workdir's metrics.jsonl; a line cut short by a kill is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in read_bytes(path, _LARGEST).splitlines():
        with contextlib.suppress(ConfigError):
            line = json_object(text, METRICS_FILE)
            for name, kind in (("step", int), ("kind", str)):
                field(line, name, kind, METRICS_FILE)
            lines.append(line)
    return lines
