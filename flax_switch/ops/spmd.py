"""Laying the sparse MLP's SPMD body over a mesh or a pmap: which part of what each device sees."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from flax_switch.config import check
from flax_switch.ops.groups import Grouping
from flax_switch.ops.ragged_exchange import Peers
from flax_switch.partitioning import BATCH_AXES, PmapDevices, partition_spec

log = logging.getLogger(__name__)

_STRADDLE = (
    "a batch of %d x %d in routing groups of %d tokens, cut into %d parts, would cut through groups. Make the tokens of a part a "
    "multiple of model.group_size, or use model.routing_group='sequence'"
)


def fits_mesh(grouping: Grouping, mesh: AbstractMesh) -> bool:
    """Whether every device of a mesh has whole groups.

    Otherwise the body runs as one program that GSPMD splits: the same results, with more communication. That is right for single
    sequences, as in initialisation and generation; for a batch it is said once in the log.
    """
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
    fits = grouping.splits(ways)
    if not fits and grouping.batch % ways == 0:
        _warn(_STRADDLE % (grouping.batch, grouping.length, grouping.group_size, ways))
    return fits


@functools.cache
def _warn(message: str) -> None:
    log.warning("Experts are not exchanged expert-parallel: %s.", message)


def over_mesh(
    body: Callable[..., tuple[Array, Any]], arrays: tuple, mesh: AbstractMesh, grouping: Grouping, *, dtype: DTypeLike
) -> tuple[Array, Any]:
    """Runs `ops.moe.route_and_execute` on every device of a mesh.

    The batch is cut over ('expert', 'data'), experts over 'expert', their F over 'model'. arrays: its global arguments (params, x,
    mask, jitter_rng, dropout_rng). The result is global too. Generators are made each device's own, so draws differ from one mesh
    to another. Devices along 'model' hold slices of each expert and the same tokens; their answers, combined, are added up at the
    end: that moves the fewest bytes, a token's D once however many slots it takes.
    """
    params, *others = arrays
    # Cast before they are handed over: what fsdp gathers, and what gradients add up over data, is in the experts' dtype.
    params = dataclasses.replace(params, expert={name: kernel.astype(dtype) for name, kernel in params.expert.items()})
    kernels = {
        name: partition_spec(("expert", "mlp", "embed") if name == "wo" else ("expert", "embed", "mlp"), kernel.shape, mesh)
        for name, kernel in params.expert.items()
    }
    sliced = "model" in kernels["wo"]
    batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    peers = Peers("expert", mesh.shape["expert"])
    own = grouping.part(math.prod(mesh.shape[a] for a in BATCH_AXES))

    def on_device(params, x, mask, jitter_rng, dropout_rng):
        rank = lax.axis_index(BATCH_AXES)
        fold = lambda rng, index: None if rng is None else jax.random.fold_in(rng, index)  # noqa: E731
        jitter_rng, dropout_rng = fold(jitter_rng, rank), fold(fold(dropout_rng, rank), lax.axis_index("model"))
        y, routed = body(params, x, mask, jitter_rng, dropout_rng, grouping=own, peers=peers)
        return y[None], routed

    # check_vma would ask every loop and custom gradient below to state over which axes it varies. Without it a psum's transpose
    # is a psum: there is none in the body.
    y, routed = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(dataclasses.replace(params, router_kernel=whole, router_bias=whole, expert=kernels), batch, batch, whole, whole),
        out_specs=(PartitionSpec("model" if sliced else None, *batch), batch),
        check_vma=False,
    )(params, *others)
    return lax.reduce_sum(y, (0,)), routed  # jnp.sum would send bfloat16 as float32


def own_groups(grouping: Grouping, ways: int) -> Grouping:
    """A device's part of the groups of all devices' batches; raises `ConfigError` where one lies on several of them."""
    check(
        grouping.splits(ways),
        "With mesh.mode='pmap' " + _STRADDLE % (grouping.batch, grouping.length, grouping.group_size, ways) + ".",
    )
    return grouping.part(ways)


def pmap_peers(devices: PmapDevices) -> Peers:
    """The devices of a pmap among which experts are split."""
    return Peers(devices.axis, devices.expert, devices.expert_groups)
