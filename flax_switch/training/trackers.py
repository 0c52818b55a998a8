"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, or any function."""

import functools
import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.config.kinds import RunConfig
from flax_switch.config.run import TRACKERS
from flax_switch.host.files import absolute, in_store
from flax_switch.training.board import Board
from flax_switch.training.live import LiveCurve, notebook_display
from flax_switch.training.sessions import read_sessions

log = logging.getLogger(__name__)

_PACKAGES = {"tensorboard": ("tensorboardX", "flax_switch[tensorboard]"), "wandb": ("wandb", "flax_switch[wandb]")}
Tracker = Callable[[int, str, dict[str, Any]], object]  # of a step, "train" or "eval", and the metrics by name


def require_trackers(log_to: Sequence[str] | None) -> None:
    """Raises `ConfigError` for a tracker whose package, or whose function, is not here."""
    for name in log_to or ():
        if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name][0]) is None:
            raise ConfigError(f"train.log_to asks for {name}: pip install '{_PACKAGES[name][1]}', or leave it out.")
        if name not in TRACKERS:
            _function(name)


def open_trackers(workdir: epath.PathLike, config: RunConfig, step: int) -> list[Tracker]:
    """Returns the trackers that `train.log_to` names, for a run at a step, and in a notebook a live curve.

    None, the default, is TensorBoard where tensorboardX is installed and the workdir is a folder.
    """
    names = config.train.log_to
    if names is None:
        here = not in_store(workdir) and importlib.util.find_spec("tensorboardX") is not None
        names = ("tensorboard",) if here else ()
    require_trackers(names)
    made: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(Path(workdir) / "tensorboard", step + 1),
        "wandb": lambda: Wandb(workdir, config),
    }
    opened = [guarded(made[name]() if name in made else _function(name), name) for name in names if name != "jsonl"]
    if (display := notebook_display()) is not None:
        opened.append(guarded(LiveCurve(display).add, "The live curve"))
    return opened


def guarded(tracker: Tracker, name: str) -> Tracker:
    """Returns a tracker that ends with its first error, which is told once: no figure on a screen is worth a run."""

    class Guarded:
        broken = False

        def __call__(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
            self.run(functools.partial(tracker, step, kind, metrics))

        def close(self) -> None:
            self.run(getattr(tracker, "close", lambda: None))

        def run(self, call: Callable[[], object]) -> None:
            if self.broken:
                return
            try:
                call()
            except Exception as error:  # whatever a tracker raises
                self.broken = True
                log.warning("%s takes no more metrics (%s: %s); training goes on without.", name, type(error).__name__, error)

    return Guarded()


def scalars(metrics: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """Yields the metrics that are numbers, and those that have one for each sparse layer layer by layer."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            yield name, value
        elif name.startswith("routers/") and np.ndim(value) == 1:
            yield from ((f"{name}/sparse_layer_{layer}", entry) for layer, entry in enumerate(value))


class TensorBoard:
    """Writes scalars as TensorBoard's events; those of steps from `purge_step` on that a killed run left are hidden."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._board = Board(folder, purge_step)

    def __call__(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        self._board.add_scalars(step, {f"{kind}/{name}": value for name, value in scalars(metrics)})

    def close(self) -> None:
        """Closes the file."""
        self._board.close()


class Wandb:
    """Sends scalars to Weights & Biases; a run that is continued continues there. Set WANDB_PROJECT, WANDB_MODE, ... as usual."""

    def __init__(self, workdir: epath.PathLike, config: RunConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - no extra of ours: it is large

        place, begun = str(absolute(workdir)), [line["time"] for line in read_sessions(workdir)][:1]
        name = hashlib.blake2b(f"{place} {begun}".encode(), digest_size=8).hexdigest()
        folder = None if in_store(workdir) else place
        self._run: Any = wandb.init(
            id=name, name=epath.Path(workdir).name, resume="allow", dir=folder, config=config.to_dict(), job_type=config.kind
        )

    def __call__(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in scalars(metrics)}, step=step)

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def _function(name: str) -> Tracker:
    """Returns the function that 'package.module:name' means."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"train.log_to asks for {name}, which cannot be imported: {error}.") from error
    check(callable(found), f"train.log_to asks for {name}, which is no function.")
    return found
