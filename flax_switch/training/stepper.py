"""A run's steps under `jax.jit` or `jax.pmap`: the same function of a state and a batch, the state held in different forms."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_switch.config import check
from flax_switch.parallel.mesh import replicated, shard_batch
from flax_switch.parallel.placement import UnderPmap
from flax_switch.training.state import Run, TrainState, is_split, state_shardings
from flax_switch.training.step import compile_train_step, train_step

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stepper:
    """How a run's state is held between steps, and how a step is made.

    `hold` takes the global form, in which states are made, saved and evaluated, to the form that `step` takes and returns;
    `release` takes it back. `step` uses up the state it is given.
    """

    step: Callable[[TrainState, HostBatch], tuple[TrainState, dict[str, Any]]]
    hold: Callable[[TrainState], TrainState] = lambda state: state
    release: Callable[[TrainState], TrainState] = lambda state: state


def build_stepper(run: Run) -> Stepper:
    """Makes the stepper that `mesh.mode` asks for."""
    if run.config.mesh.mode == "pmap":
        return _pmap_stepper(run)
    step = compile_train_step(run)
    return Stepper(lambda state, batch: step(state, shard_batch(batch, run.mesh)))


def _pmap_stepper(run: Run) -> Stepper:
    """`train_step` under pmap: arrays cut by experts get a leading axis of devices, the others are whole on each."""
    check(
        jax.process_count() == 1,
        f"mesh.mode='pmap' drives the devices of one process; there are {jax.process_count()} processes. Set mesh.mode='jit'.",
    )
    mesh, abstract = run.mesh, run.abstract_state
    assert isinstance(mesh, Mesh)
    devices = UnderPmap(mesh.shape["data"], mesh.shape["expert"])
    on_device = dataclasses.replace(run, model=run.model.clone(devices=devices))
    rows, pieces = run.config.data.batch_size, run.config.train.microbatches
    check(
        rows % (devices.size * pieces) == 0,
        f"With mesh.mode='pmap' data.batch_size ({rows}) must be a multiple of {devices.size} devices x train.microbatches "
        f"({pieces}).",
    )
    axes = jax.tree.map(lambda leaf: 0 if is_split(leaf) else None, abstract)

    pmapped = jax.pmap(
        functools.partial(train_step, on_device), devices.axis, in_axes=(axes, 0), out_axes=(axes, None), donate_argnums=0,
        devices=tuple(mesh.devices.flat),
    )  # fmt: skip

    def step(state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, Any]]:
        return pmapped(state, {name: x.reshape(devices.size, -1, *x.shape[1:]) for name, x in batch.items()})

    def stack(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """[..., E, ...] as [data * expert, ..., E / expert, ...]: every replica of its experts has a copy."""
        if not is_split(leaf):
            return x
        axis = leaf.sharding.spec.index("expert")
        x = x.reshape(*x.shape[:axis], devices.expert, -1, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis, 0)
        return jnp.broadcast_to(x, (devices.data, *x.shape)).reshape(devices.size, *x.shape[1:])

    def unstack(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not is_split(leaf):
            return x
        axis = leaf.sharding.spec.index("expert")
        return jnp.moveaxis(x[: devices.expert], 0, axis).reshape(leaf.shape)

    by_device = NamedSharding(mesh, PartitionSpec(("data", "expert")))
    held = jax.tree.map(lambda leaf: by_device if is_split(leaf) else replicated(mesh), abstract)
    return Stepper(
        step,
        hold=jax.jit(lambda state: jax.tree.map(stack, state, abstract), out_shardings=held),
        release=jax.jit(lambda state: jax.tree.map(unstack, state, abstract), out_shardings=state_shardings(run)),
    )
