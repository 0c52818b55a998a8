"""Where a program runs, as one value that is passed by argument: on one device, over a mesh, under pmap, or as XLA lays it out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from flax_switch.parallel.mesh import BATCH_AXES, AnyMesh


@dataclasses.dataclass(frozen=True)
class Placement:
    """A program that is all of a step and has the whole batch, as on one device: sums and means over devices are the identity."""

    @property
    def size(self) -> int:
        """How many programs share a step."""
        return 1

    @property
    def in_parts(self) -> bool:
        """Whether parameters lie in parts, each to be gathered where it is used (`parallel.gathering`)."""
        return False

    def sum(self, x: Any) -> Any:
        """Adds up a tree over all devices."""
        return x

    def mean(self, x: Any) -> Any:
        """Returns a tree's mean over all devices."""
        return x

    def sum_over_experts(self, x: Any) -> Any:
        """Adds up what each device has of its own experts, each expert once."""
        return x

    def mean_of_experts(self, x: Any) -> Any:
        """Returns the mean of what differs from expert to expert, and on each device holds the whole batch's."""
        return x

    def own_key(self, key: jax.Array) -> jax.Array:
        """Returns a key with which each device draws differently."""
        return key

    def own_experts(self, num_experts: int) -> int:
        """Returns how many of the experts' kernels the program is handed."""
        return num_experts

    def keep_batch_split(self, x: jax.Array) -> jax.Array:
        """Keeps activations [B, ...] split as the batch is."""
        return x


@dataclasses.dataclass(frozen=True)
class LaidOutByCompiler(Placement):
    """Arrays lie on several devices and XLA alone decides what moves, as in generation. No device can pick from all experts."""


@dataclasses.dataclass(frozen=True)
class OnMesh(Placement):
    """One program over a mesh of several devices with our axes; sparse layers send tokens to the devices of their experts."""

    mesh: AnyMesh
    fsdp: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether the run has `mesh.fsdp`."""
        return self.fsdp

    def keep_batch_split(self, x: jax.Array) -> jax.Array:
        """Constrains activations [B, ...] to be split as the batch is, where the mesh divides their rows.

        Without it GSPMD may prefer to cut activations like fsdp's parameters, and move every row to do so.
        """
        if x.shape[0] % math.prod(self.mesh.shape[a] for a in BATCH_AXES):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))


@dataclasses.dataclass(frozen=True)
class UnderPmap(Placement):
    """The body of a pmap: one named axis, on which device d * expert + e holds part e of the experts and its part of the batch."""

    data: int
    expert: int
    axis: str = "devices"

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.data * self.expert

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """Devices that together hold all experts once."""
        return tuple(tuple(d * self.expert + e for e in range(self.expert)) for d in range(self.data))

    @property
    def data_groups(self) -> tuple[tuple[int, ...], ...]:
        """Devices that hold the same experts."""
        return tuple(zip(*self.expert_groups, strict=True))

    def sum(self, x: Any) -> Any:
        """Sums a tree over all devices."""
        return jax.lax.psum(x, self.axis)

    def mean(self, x: Any) -> Any:
        """Averages a tree over all devices."""
        return jax.lax.pmean(x, self.axis)

    def sum_over_experts(self, x: Any) -> Any:
        """Sums over devices that together hold all experts once."""
        return jax.lax.psum(x, self.axis, axis_index_groups=self.expert_groups)

    def mean_of_experts(self, x: Any) -> Any:
        """Returns the mean over the replicas of a device's experts, which hold every peer's share."""
        return jax.lax.psum(x, self.axis, axis_index_groups=self.data_groups) / self.size

    def own_key(self, key: jax.Array) -> jax.Array:
        """Returns the key with the device's number folded in."""
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis))

    def own_experts(self, num_experts: int) -> int:
        """Returns a device's share of the experts."""
        return num_experts // self.expert


ONE_DEVICE = Placement()


def placed_on(mesh: AnyMesh, *, fsdp: bool = False) -> Placement:
    """Returns the placement of a program that jit compiles for a mesh."""
    return OnMesh(mesh, fsdp) if mesh.size > 1 else ONE_DEVICE
