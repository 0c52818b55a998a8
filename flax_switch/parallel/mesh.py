"""The mesh, and the one table that maps logical axis names to mesh axes.

Parameters are declared with logical axis names (`flax_switch.nn.layers`); `RULES` says which mesh axis each name is split over.
Batches are split over the expert and data axes together, so that expert parallelism costs no batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_switch.config import MeshConfig, check

MESH_AXES = ("data", "expert", "model")
AnyMesh = Mesh | AbstractMesh  # the planner has shapes and shardings without devices

# Logical axis -> mesh axis, None for replicated. With fsdp, parameters' "embed" goes over the batch's axes, too, or over "data".
BATCH_AXES = ("expert", "data")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "expert": "expert",
    "mlp": "model",
    "heads": "model",
    "joined_kv": "model",
    "multiquery_heads": None,  # the one head of keys and values of fused layers
    "q_wi_fused": None,
    "kv_fused": None,
    "o_wo_fused": None,
    "vocab": "model",
    "embed": None,
    "length": None,
    "layers": None,
    "relpos_buckets": None,
    "unmodeled": None,
}


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns sizes of the axes (data, expert, model), -1 resolved; they must multiply to the number of devices."""
    sizes = [config.data, config.expert, config.model]
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        check(
            num_devices % rest == 0,
            f"mesh axes data={config.data}, expert={config.expert}, model={config.model} do not fit {num_devices} devices: "
            f"{rest} does not divide {num_devices}.",
        )
        sizes[sizes.index(-1)] = num_devices // rest
    check(
        math.prod(sizes) == num_devices,
        f"mesh axes {dict(zip(MESH_AXES, sizes, strict=True))} need {math.prod(sizes)} devices; there are {num_devices}. "
        f"Set one axis to -1 to take what is left.",
    )
    data, expert, model = sizes
    check(
        data % config.dcn_data == 0,
        f"mesh.dcn_data ({config.dcn_data}) must divide mesh.data, which is {data} on {num_devices} devices.",
    )
    check(
        expert % config.dcn_expert == 0,
        f"mesh.dcn_expert ({config.dcn_expert}) must divide mesh.expert, which is {expert} on {num_devices} devices.",
    )
    return data, expert, model


def create_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices (or those given), laid out for the interconnect."""
    devices = jax.devices() if devices is None else list(devices)
    shape, slices = mesh_shape(config, len(devices)), (config.dcn_data, config.dcn_expert, 1)
    inside = [size // ways for size, ways in zip(shape, slices, strict=True)]
    grids = np.empty(slices, object)
    for place, members in zip(np.ndindex(slices), slices_of(devices, math.prod(slices)), strict=True):
        grids[place] = mesh_utils.create_device_mesh(inside, devices=members, allow_split_physical_axes=True)
    array = np.block(grids.tolist())
    # Auto axes: GSPMD propagates the shardings; make_mesh's default of explicit axes would put them into the types.
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slices_of(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """Returns the devices of each of `count` slices: of those the devices say they are in, of processes, or equal shares in order.

    Raises `ConfigError` where the devices lie in another number of slices.
    """
    if count == 1:
        return [list(devices)]
    for attribute in ("slice_index", "process_index"):
        found = sorted({getattr(device, attribute, 0) for device in devices})
        if len(found) == count:
            return [[d for d in devices if getattr(d, attribute, 0) == index] for index in found]
        check(
            attribute != "slice_index" or len(found) == 1,
            f"mesh.dcn_data x mesh.dcn_expert must be the number of slices, {len(found)} here; it is {count}.",
        )
    size = len(devices) // count
    return [list(devices[i * size : (i + 1) * size]) for i in range(count)]


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, *, fsdp: bool = False) -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    An axis whose size the mesh axis does not divide stays whole, except "expert", where that is an error: experts are never
    split unevenly.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        rule = RULES[name] if name else None
        if fsdp and name == "embed" and not {"data", BATCH_AXES} & set(entries):
            everywhere = "expert" not in axes and size % (mesh.shape["expert"] * mesh.shape["data"]) == 0
            rule = BATCH_AXES if everywhere and mesh.shape["expert"] > 1 else "data"
        ways = math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule or ()))
        check(
            name != "expert" or size % ways == 0,
            f"{size} experts cannot be split over an expert axis of {ways}; set mesh.expert to a divisor of num_experts.",
        )
        # A mesh axis can split one dimension only: attention's relative table has heads, kernels joined_kv; never both.
        entries.append(rule if ways > 1 and size % ways == 0 and rule not in entries else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def tree_shardings(axes: Any, shapes: Any, mesh: AnyMesh, *, fsdp: bool = False) -> Any:
    """Returns the tree of `NamedSharding`s for a tree of logical axes (tuples) and one of shapes (anything with `.shape`)."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, fsdp=fsdp)),
        axes,
        shapes,
        is_leaf=lambda x: type(x) is tuple and all(isinstance(n, str) or n is None for n in x),  # no NamedTuple
    )


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of a batch over its first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: AnyMesh) -> int:
    """Returns into how many parts a batch is split."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_batch_size(size: int, mesh: AnyMesh) -> None:
    """Raises `ConfigError` unless the mesh splits batches of `size` rows evenly."""
    check(
        size % batch_ways(mesh) == 0,
        f"data.batch_size ({size}) must be a multiple of the {batch_ways(mesh)} devices the batch is split over (mesh data x "
        "expert).",
    )


def batch_rows(mesh: AnyMesh, batch_size: int) -> np.ndarray:
    """Returns which rows of a batch [B, ...] this process's devices hold, ascending.

    They need not lie together, and processes that only the model axis divides hold the same ones.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def shard_batch(batch: dict[str, np.ndarray], mesh: AnyMesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch, its `batch_rows`, onto the mesh as global arrays [B, ...]."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
