"""The pmap mode: one named axis of devices, and how code that is traced learns that it runs under one."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


class OneProgram:
    """Where a program is all of a step, as under jit: it has the whole batch, so sums and means over devices are the identity."""

    size = 1

    def sum(self, x: Any) -> Any:
        """Adds up a tree over all devices."""
        return x

    def mean(self, x: Any) -> Any:
        """Returns a tree's mean over all devices."""
        return x

    def mean_of_experts(self, x: Any) -> Any:
        """Returns the mean of what differs from expert to expert, and on each device holds the whole batch's."""
        return x

    def own_key(self, key: jax.Array) -> jax.Array:
        """Returns a key with which each device draws differently."""
        return key


@dataclasses.dataclass(frozen=True)
class PmapDevices(OneProgram):
    """The devices of a pmap: one named axis, on which device d * expert + e holds part e of the experts."""

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

    def sum(self, x: Any, groups: tuple[tuple[int, ...], ...] | None = None) -> Any:
        """Sums a tree over all devices, or over those of a group."""
        return jax.lax.psum(x, self.axis, axis_index_groups=groups)

    def mean(self, x: Any) -> Any:
        """Averages a tree over all devices."""
        return jax.lax.pmean(x, self.axis)

    def mean_of_experts(self, x: Any) -> Any:
        """Returns the mean over the replicas of a device's experts, which hold every peer's share."""
        return self.sum(x, self.data_groups) / self.size

    def own_key(self, key: jax.Array) -> jax.Array:
        """Returns the key with the device's number folded in."""
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis))


_PMAP: contextvars.ContextVar[PmapDevices | None] = contextvars.ContextVar("pmap_devices", default=None)


@contextlib.contextmanager
def inside_pmap(devices: PmapDevices) -> Iterator[PmapDevices]:
    """Says, while the body of a pmap is traced, that it is one and over which devices."""
    token = _PMAP.set(devices)
    try:
        yield devices
    finally:
        _PMAP.reset(token)


def pmap_devices() -> PmapDevices | None:
    """Returns the devices of the pmap whose body is being traced, if one is."""
    return _PMAP.get()


def step_devices() -> OneProgram:
    """Returns the devices over which a step that is being traced adds up: a pmap's, or under jit its one program."""
    return _PMAP.get() or OneProgram()
