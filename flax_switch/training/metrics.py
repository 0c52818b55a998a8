"""What a run writes down: metrics.jsonl, one line per logged step, and TensorBoard events where tensorboardX is installed."""

import contextlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_switch.config import ConfigError
from flax_switch.host.files import in_store, read_bytes, write_text
from flax_switch.host.json_text import json_object
from flax_switch.training.board import Board
from flax_switch.training.live import LiveCurve, notebook_display

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


def scalars(metrics: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """Yields the metrics that are numbers, and those that have one for each sparse layer layer by layer."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            yield name, value
        elif name.startswith("routers/") and np.ndim(value) == 1:
            yield from ((f"{name}/sparse_layer_{layer}", entry) for layer, entry in enumerate(value))


class MetricsWriter:
    """Appends to a workdir's metrics. Lines after `resume_step` are dropped first: the run will write them again.

    In a notebook a live curve shows them. Only the first of several processes writes. On a disk every line is there at once; in
    object storage, where nothing can be appended, after `flush` and `close`, and TensorBoard's events are left out.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0):
        self._board, self._curve, self._writes = None, None, jax.process_index() == 0
        if not self._writes:
            return
        self._path = epath.Path(workdir) / METRICS_FILE
        self._stored = in_store(self._path)
        self._lines = [json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= resume_step]
        write_text(self._path, "".join(self._lines))
        if (display := notebook_display()) is not None:
            self._curve = LiveCurve(display)
        if not self._stored and importlib.util.find_spec("tensorboardX") is not None:
            self._board = Board(Path(workdir) / "tensorboard", purge_step=resume_step + 1)

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
        if self._curve is not None:
            self._curve.add(step, kind, metrics)
        if self._board is not None:
            self._board.add_scalars(step, {f"{kind}/{name}": value for name, value in scalars(metrics)})

    def flush(self) -> None:
        """Writes what is held back; call it before a checkpoint is saved, so that no checkpoint is ahead of the metrics."""
        if self._writes and self._stored:
            write_text(self._path, "".join(self._lines))

    def close(self) -> None:
        """Flushes all that is held back."""
        self.flush()
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: epath.PathLike) -> Iterable[dict[str, Any]]:
    """Returns the lines of a workdir's metrics.jsonl; a line cut short by a kill is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in read_bytes(path, _LARGEST).splitlines():
        with contextlib.suppress(ConfigError):
            lines.append(json_object(text, METRICS_FILE))
    return lines
