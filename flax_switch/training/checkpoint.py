"""Checkpoints of a run: Orbax, asynchronous, complete or absent, restored straight into any sharding.

A workdir holds

    config.json                    the run's config, its kind first
    vocabulary/                    its vocabulary
    checkpoints/<step>/            params, opt_state, meta (rng, position in the data), each complete or not there
    metrics.jsonl, events...       what `flax_switch.training.metrics` writes
"""

import dataclasses
import errno
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.config.kinds import RUNS, RunConfig, kind_of
from flax_switch.host.files import absolute, write_text
from flax_switch.host.json_text import read_json
from flax_switch.training.skipped import all_finite
from flax_switch.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FORMAT_VERSION = 1


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: epath.PathLike, keep_last: int = 3, keep_every: int | None = None):
        """Opens or creates `workdir/checkpoints`; steps that are multiples of `keep_every` are kept for good."""
        self.workdir = epath.Path(workdir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(absolute(self.workdir) / CHECKPOINTS, options=options)

    def save(self, state: TrainState, data_state: Any) -> None:
        """Starts saving; training goes on meanwhile. A second save waits for the first. Does nothing if the step is saved."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if not all_finite(state.params):
            raise FloatingPointError(
                f"Parameters are no numbers after step {step}, and are not saved. Earlier checkpoints are kept. Lower "
                "optimizer.learning_rate, which a run may change when it goes on."
            )
        meta = {"version": FORMAT_VERSION, "rng": np.asarray(state.rng).tolist(), "data": data_state}
        with explain_full_disk(self.workdir):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def wait(self) -> None:
        """Returns when what `save` started is on disk; raises what went wrong there."""
        with explain_full_disk(self.workdir):
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Returns the step of the last complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """Restores the state and the data position of a step (the last by default), each array read into `abstract`'s sharding."""
        step = self.latest_step() if step is None else step
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
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
        self.wait()
        self._manager.close()


class explain_full_disk:  # noqa: N801 - reads as a statement
    """Turns "no space left" into one sentence that says what is safe."""

    def __init__(self, workdir: epath.PathLike):
        self.workdir = workdir

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
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
