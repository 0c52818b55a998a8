"""Checkpoints of a run: Orbax, asynchronous, complete or absent, restored straight into any sharding.

A workdir holds

    config.json                    the run's config, its kind first
    vocabulary/                    its vocabulary
    checkpoints/<step>/            params, opt_state, meta (rng, position in the data), manifest.json; complete or not there
    metrics.jsonl, events...       what `flax_switch.training.metrics` writes

On a disk a checkpoint is `<step>.saving` until its manifest is written, and `<step>.deleting` once it is no longer kept: what a
kill left of these is removed. One that was found damaged is set aside as `<step>.damaged`.
"""

import dataclasses
import errno
import functools
import itertools
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from flax_switch.config import ConfigError, check
from flax_switch.config.adapter import ADAPTER
from flax_switch.config.kinds import RUNS, RunConfig, kind_of
from flax_switch.host.files import absolute, in_store, remove_temporaries, write_text
from flax_switch.host.json_text import json_object, read_json
from flax_switch.host.manifest import SINCE_VERSION, damage, has_manifest, measure, write_manifest
from flax_switch.parallel import processes
from flax_switch.training.skipped import NotFiniteError, all_finite
from flax_switch.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FORMAT_VERSION = SINCE_VERSION
_ITEMS = ("params", "opt_state", "meta")
_STRAY = re.compile(r"\d+(\.saving|\.deleting)?(\.orbax-checkpoint-tmp.*)?")
_COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in object storage, where nothing is renamed
_OWNER = re.compile(r"process_(\d+)(?:/|$)")  # in the paths of files that one process alone writes

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: epath.PathLike, keep_last: int = 3, keep_every: int | None = None):
        """Opens or creates `workdir/checkpoints`; steps that are multiples of `keep_every` are kept for good."""
        _say_errors_once()
        self.workdir, self._keep_last, self._keep_every = epath.Path(workdir), keep_last, keep_every
        self._folder = absolute(self.workdir) / CHECKPOINTS
        self._stored, self._first = in_store(self._folder), jax.process_index() == 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*_ITEMS))
        self._background = ThreadPoolExecutor(1)
        self._saving: Future | None = None

    def save(self, state: TrainState, data_state: Any) -> None:
        """Starts saving; training goes on meanwhile. A second save waits for the first. Does nothing if the step is saved."""
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        params = _kept(state.params)
        if not all_finite(params):
            raise NotFiniteError(
                f"Parameters are no numbers after step {step}, and are not saved. Earlier checkpoints are kept. Lower "
                "optimizer.learning_rate, which a run may change when it goes on."
            )
        meta = {"version": FORMAT_VERSION, "rng": np.asarray(state.rng).tolist(), "data": data_state}
        with explain_full_disk(self.workdir):
            self._orbax.save(
                self._folder / (str(step) if self._stored else f"{step}.saving"),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        self._saving = self._background.submit(self._complete, step)

    def _complete(self, step: int) -> None:
        """Gives what is being saved its manifest and its name, each process summing up its own files; then older ones may go."""
        self._orbax.wait_until_finished()
        if not self._stored:
            folder, me, count = Path(self._folder / f"{step}.saving"), jax.process_index(), jax.process_count()
            own = measure(folder, lambda name: _owner(name, count) == me)
            texts = processes.gather_at_first(f"manifest/{step}", json.dumps(own))
            if self._first:
                parts = [json_object(text, "a part of a manifest") for text in texts]
                write_manifest(folder, {name: entry for part in parts for name, entry in part.items()})
                folder.rename(self._folder / str(step))
        if self._first:
            steps = self.steps()
            for old in steps[: -self._keep_last]:
                if not self._keep_every or old % self._keep_every:
                    self._delete(old)

    def _delete(self, step: int) -> None:
        folder = self._folder / str(step)
        if self._stored:
            (folder / _COMMITTED).unlink(missing_ok=True)
            folder.rmtree()
        else:
            shutil.rmtree(folder.rename(self._folder / f"{step}.deleting"), ignore_errors=True)

    def wait(self) -> None:
        """Returns when what `save` started is on disk; raises what went wrong there."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with explain_full_disk(self.workdir):
                saving.result()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        found = (path for path in self._folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
        return sorted(int(path.name) for path in found if ((path / _COMMITTED).exists() if self._stored else path.is_dir()))

    def latest_step(self) -> int | None:
        """Returns the step of the last complete checkpoint."""
        return max(self.steps(), default=None)

    def remove_strays(self) -> None:
        """Removes what a killed run of this workdir left half-written or half-deleted. No other run may be at work there."""
        if not self._first or self._stored:
            return
        for path in self._folder.iterdir():
            if _STRAY.fullmatch(path.name) and not path.name.isdecimal() and path.is_dir():
                shutil.rmtree(path)
        for folder in (self.workdir, self.workdir / "vocabulary", self.workdir / "predictions"):
            remove_temporaries(folder)

    def restore(
        self, abstract: TrainState, *, verify: bool = True, say: Callable[[str], None] = log.warning
    ) -> tuple[TrainState, Any]:
        """Restores the newest checkpoint that is whole: its state, each array read into `abstract`'s sharding, and data position.

        Of a run with an adapter the parameters are the adapter alone. Newer ones that are damaged are set aside, and `say` is
        told of each in a sentence.

        Args:
          verify: compare every file with the manifest before it is used. Without, and in checkpoints of 0.1.0, which have none,
            only what cannot be read is noticed.

        Raises:
          ConfigError: where no checkpoint is whole.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            found = self._damage(step) if verify else None
            if found is None:
                try:
                    restored = self._read(abstract, step)
                except Exception as error:  # Orbax and tensorstore have no common one
                    if jax.process_count() > 1 or (verify and has_manifest(self._folder / str(step))):
                        raise
                    found = f"it cannot be read: {str(error)[:200].partition(chr(10))[0]}"
                else:
                    self._set_aside(damaged, step, say)
                    return restored
            damaged[step] = found
        listed = "; ".join(f"{step} ({found})" for step, found in damaged.items())
        raise ConfigError(
            f"No checkpoint in {self._folder} is whole: {listed}. Put back a copy of one, give --no-verify to go on from the "
            "newest as it is, or name another workdir."
        )

    def _damage(self, step: int) -> str | None:
        """Says what is wrong with a checkpoint, of whose files each process has read its share; the same in every process."""
        me, count = jax.process_index(), jax.process_count()
        found = damage(self._folder / str(step), share=(me, count))
        if count == 1:
            return found
        flags = multihost_utils.process_allgather(np.array(found is not None))
        return (found or f"process {int(np.argmax(flags))} says in what") if flags.any() else None

    def _set_aside(self, damaged: dict[int, str], step: int, say: Callable[[str], None]) -> None:
        for bad, found in damaged.items():
            folder, aside = self._folder / str(bad), self._folder / f"{bad}.damaged"
            where = "" if self._stored else f"; it is set aside as {aside}"
            say(f"The checkpoint of step {bad} is damaged ({found}){where}, and step {step} is used.")
            if self._first and self._stored:
                (folder / _COMMITTED).unlink(missing_ok=True)  # it will be written anew
            elif self._first:
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                folder.rename(aside)

    def _read(self, abstract: TrainState, step: int) -> tuple[TrainState, Any]:
        restored = self._orbax.restore(
            self._folder / str(step),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_kept(abstract.params)),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
                meta=ocp.args.JsonRestore(),
            ),
        )
        meta = restored["meta"]
        state = TrainState(
            step=jax.device_put(jnp.int32(step), abstract.step.sharding),
            params=restored["params"],
            opt_state=restored["opt_state"],
            rng=jax.device_put(np.asarray(meta["rng"], np.uint32), abstract.rng.sharding),
        )
        return state, meta["data"]

    def close(self) -> None:
        """Waits for what is being saved and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()


def _kept(params: Any) -> Any:
    """Returns what a checkpoint holds of a run's parameters: where there is an adapter that alone, as all else stays as it was."""
    return {ADAPTER: params[ADAPTER]} if ADAPTER in params else params


@functools.cache
def _say_errors_once() -> None:
    """Drops what Orbax logs of errors that it raises here, too, and what becomes of its other readers and writers after one."""
    logging.getLogger("absl").addFilter(lambda record: record.exc_info is None or "orbax" not in record.pathname)
    hook = sys.unraisablehook

    def without_late_callbacks(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_late_callbacks


def _owner(name: str, count: int) -> int:
    """Returns the process that sums up a file: the one that writes it, process 0 for what all of them write."""
    match = _OWNER.search(name)
    return int(match[1]) if match and int(match[1]) < count else 0


class explain_full_disk:  # noqa: N801 - reads as a statement
    """Turns "no space left" into one sentence that says what is safe."""

    def __init__(self, workdir: epath.PathLike):
        self.workdir = workdir

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ConfigError):  # it says so already
            return
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (error is not None and any(text in str(error) for text in ("No space left", "RESOURCE_EXHAUSTED: write"))):
            raise ConfigError(
                f"No space left for {self.workdir}. Earlier checkpoints there are complete and untouched: free some space (or "
                f"lower train.keep_last) and run the same command again to go on from the last one."
            ) from error


class OtherRunError(ConfigError):
    """The workdir holds a run of another config."""


def claim_workdir(workdir: epath.PathLike, config: RunConfig) -> epath.Path:
    """Creates the workdir with its config, or checks that it belongs to the same run.

    Raises `ConfigError` that names the differing fields where the config there describes another run, or where the folder holds
    something else.
    """
    workdir = epath.Path(workdir)
    path = workdir / CONFIG_FILE
    if not path.exists():
        if jax.process_index() > 0:
            raise ConfigError(
                f"Process {jax.process_index()} does not see {path}, which process 0 has written. The workdir must lie where all "
                "processes can read and write it: a network file system, or object storage (gs://..., s3://...)."
            )
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"The workdir {workdir} is a file; name a folder.")
        strangers = (
            [p.name for p in workdir.iterdir() if not p.name.startswith(".") and ".tmp-" not in p.name] if workdir.exists() else []
        )
        if strangers:
            raise ConfigError(
                f"The workdir {workdir} holds {', '.join(sorted(strangers)[:3])} and no {CONFIG_FILE}, so it belongs to "
                "something else; name an empty or a new folder."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, config)
        return workdir
    found = read_config(workdir)
    differing = differing_fields(found, config)
    if differing:
        raise OtherRunError(
            f"The workdir {workdir} holds another run. It differs in: {'; '.join(differing)}. Restore these settings to continue "
            f"it, or name a new workdir: --workdir {_unused(workdir)}."
        )
    if found != config:  # in what may change
        write_config(workdir, config)
    return workdir


def _unused(workdir: epath.Path) -> epath.Path:
    """Returns a folder beside `workdir` that is not there yet: runs/tiny_2."""
    beside = (workdir.parent / f"{workdir.name}_{number}" for number in itertools.count(2))
    return next(path for path in beside if not path.exists())


def differing_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """Names the fields, of those a resumed run may not change, in which two configs differ: 'data.seed was 0, is 1'."""
    was, now = flat_fields(old), flat_fields(new)
    changeable = changeable_fields(old) | changeable_fields(new)
    return [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in dict.fromkeys((*was, *now))
        if was.get(key) != now.get(key) and key not in changeable
    ]


def changeable_fields(config: RunConfig) -> set[str]:
    """Returns the names, as in `flat_fields`, of what a resumed run may change: what is marked by `config.base.may_change`."""
    return {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, section.name))
        for field in dataclasses.fields(value)
        if "may_change" in section.metadata | field.metadata
    }


def flat_fields(config: RunConfig) -> dict[str, Any]:
    """Returns {"data.seed": 0, ...}: every field under its section's name; one that is in no section under its own."""
    flat = {}
    for section, value in config.to_dict().items():
        flat |= {f"{section}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {section: value}
    return flat


def write_config(workdir: epath.PathLike, config: RunConfig) -> None:
    """Writes `config.json`, complete or not at all."""
    with explain_full_disk(workdir):
        write_text(epath.Path(workdir) / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(workdir: epath.PathLike) -> RunConfig:
    """Reads the config of the run in a workdir."""
    path = epath.Path(workdir) / CONFIG_FILE
    check(path.exists(), f"{workdir} is no workdir of a run: it has no {CONFIG_FILE}.")
    values = read_json(path)
    return RUNS[kind_of(values)].from_dict(values)
