"""The pmap mode: one named axis of devices, and how code that is traced learns that it runs under one."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class PmapDevices:
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
