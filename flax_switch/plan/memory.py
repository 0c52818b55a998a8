"""What each device holds, from shapes and shardings alone: state exactly, gradients and activations as an estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from flax_switch.config import ExperimentConfig, check
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.ops.mlp import expert_dtype
from flax_switch.ops.moe.expert_parallel import room_of
from flax_switch.parallel.mesh import MESH_AXES, AnyMesh, batch_ways
from flax_switch.training.state import Run, is_split
from flax_switch.training.step import abstract_batch, forward


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device during a train step."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int  # kept by the forward pass for the backward pass; an estimate that knows nothing of XLA's fusions
    rounds: int = 0  # see `further_rounds`

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    """Returns a mesh of no devices, for shapes and shardings."""
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_structs(config: ExperimentConfig, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the batch that a train step takes, as shapes with shardings. Raises `ConfigError` where it cannot be split evenly."""
    data, ways = config.data, batch_ways(mesh)
    pieces = config.train.microbatches
    multiple = ways * pieces
    check(
        data.batch_size % multiple == 0,
        f"data.batch_size ({data.batch_size}) must be a multiple of {multiple}: it is split {ways} ways (mesh data x expert) "
        f"and into {pieces} microbatches. Set --config.data.batch_size={multiple * max(1, data.batch_size // multiple)}, or change "
        "the mesh.",
    )
    return abstract_batch(config, mesh)


def device_bytes(tree: Any) -> int:
    """Returns bytes of one device's part of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def train_memory(run: Run, batch: dict[str, jax.ShapeDtypeStruct]) -> Memory:
    """Returns memory of `run`'s train step on `batch`; traces the model once, and compiles nothing."""
    state = run.abstract_state
    parameters = device_bytes(state.params)
    # A sum of micro-batches is kept beside the gradients of the one at work.
    gradients = parameters * (2 if run.config.train.microbatches > 1 else 1)
    return Memory(
        parameters, device_bytes((state.opt_state, state.step, state.rng)), device_bytes(batch), gradients,
        saved_activations(run, batch), further_rounds(run),
    )  # fmt: skip


def further_rounds(run: Run) -> int:
    """Returns bytes that a dropless layer needs, taken or not, for the rounds in which more rows are served than there is room for.

    They are those of the backward pass of one layer: the gradients of a device's experts, added up over rounds, once more, and
    the rows of a round with what the experts make of them, values and gradients. An estimate, as activations are.
    """
    config, mesh = run.config.model, run.mesh
    ways, width = mesh.shape["expert"], jnp.dtype(expert_dtype(config)).itemsize
    sparse = [stack for stack in config.stacks if stack.num_sparse]
    if config.capacity_mode != "dropless" or ways == 1 or not sparse or not isinstance(run.config, ExperimentConfig):
        return 0
    data = run.config.data
    tokens = max(data.stack_lengths(config)[stack.name] for stack in sparse) * data.batch_size
    choices = tokens * config.num_selected_experts // (batch_ways(mesh) * run.config.train.microbatches)
    room = room_of(choices, ways, config.expert_parallel_buffer_factor)
    if room == ways * choices:
        return 0
    experts = [leaf for leaf in jax.tree.leaves(run.abstract_state.params) if is_split(leaf)]
    of_layer = sum(leaf.size for leaf in experts) / (ways * mesh.shape["model"] * sum(stack.num_sparse for stack in sparse))
    hidden = (len(config.mlp_activations) + 1) * config.expert_width / mesh.shape["model"]
    return round(width * (of_layer + 2 * room * (4 * config.d_model + hidden)))


def saved_activations(run: Run, batch: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Returns bytes a device keeps from the forward pass of one micro-batch for its backward pass.

    They are what JAX's linearisation closes over: all arrays but the parameters themselves, split as the batch is; copies of
    parameters in the activations' dtype are split as the parameters are.
    """
    pieces, params = run.config.train.microbatches, run.abstract_state.params
    piece = {name: jax.ShapeDtypeStruct((x.shape[0] // pieces, *x.shape[1:]), x.dtype) for name, x in batch.items()}

    def pullback(params, piece, rng):
        def loss(params):
            output = forward(run.model, params, piece, jax.random.wrap_key_data(rng))
            return seq2seq_loss(output, piece["labels"], run.config.model).loss

        return jax.vjp(loss, params)[1]

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    kept = jax.tree.leaves(jax.eval_shape(pullback, plain, piece, run.abstract_state.rng))
    share = {_kind(leaf): device_bytes([leaf]) / (leaf.size * leaf.dtype.itemsize) for leaf in jax.tree.leaves(params)}
    ways = batch_ways(run.mesh)
    total = 0.0
    for leaf in _without(kept, jax.tree.leaves(params)):
        of_parameters = len(leaf.shape) > 1 and _kind(leaf) in share
        total += leaf.size * leaf.dtype.itemsize * (share[_kind(leaf)] if of_parameters else 1 / ways)
    return round(total)


def _kind(leaf: Any) -> tuple[int, ...]:
    """Returns a shape up to the order of its axes: scanned stacks travel with their layers first."""
    return tuple(sorted(leaf.shape))


def _without(leaves: Iterable[Any], others: Iterable[Any]) -> list[Any]:
    """Returns `leaves` less one of each shape and dtype that `others` have."""
    rest: dict[tuple, int] = {}
    for leaf in others:
        key = (_kind(leaf), leaf.dtype)
        rest[key] = rest.get(key, 0) + 1
    kept = []
    for leaf in leaves:
        key = (_kind(leaf), leaf.dtype)
        if rest.get(key, 0) > 0:
            rest[key] -= 1
        else:
            kept.append(leaf)
    return kept
