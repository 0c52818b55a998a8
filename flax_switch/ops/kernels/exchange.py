"""Rows of any number sent between any two of several devices.

Device s sends `counts[s, r]` rows to device r, which lie together on both. A shipment's way back brings every row to where it was,
and is the gradient too.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from flax_switch.ops.kernels import platforms


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices that experts are split over, as each of them sees them inside an SPMD body."""

    axis: str  # the named axis they lie on
    ways: int  # how many they are: device i of them holds the i-th part of the experts
    groups: tuple[tuple[int, ...], ...] | None = None  # indices of peers, where the axis holds others too
    others: str | None = None  # the named axis of the devices of the program that are no peers; None where all are

    def index(self) -> Int[Array, ""]:
        """Returns which of its peers a device is."""
        index = lax.axis_index(self.axis)
        if self.groups is None:
            return index
        places = {device: place for group in self.groups for place, device in enumerate(group)}
        return jnp.asarray([places[device] for device in range(len(places))], jnp.int32)[index]

    def all_to_all(self, x: Array, split_axis: int, concat_axis: int) -> Array:
        """Sends part i of `split_axis` to peer i, and joins what comes along `concat_axis`, by sender."""
        return lax.all_to_all(x, self.axis, split_axis, concat_axis, axis_index_groups=self.groups, tiled=True)

    def all_gather(self, x: Array) -> Array:
        """Returns x of every peer, on a new leading axis."""
        return lax.all_gather(x, self.axis, axis_index_groups=self.groups)

    def largest(self, x: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the largest of all devices' values, which peers have alike already."""
        return x if self.others is None else lax.pmax(x, self.others)


class Shipment(NamedTuple):
    """Which rows go where, the same on all peers; each [sender, receiver], receivers and senders in order."""

    counts: Int[Array, "P P"]
    taken: Int[Array, "P P"]  # where they begin among the sender's rows
    put: Int[Array, "P P"]  # and where among the receiver's

    @classmethod
    def of_all(cls, counts: Int[Array, "P P"]) -> Self:
        """Returns that of all rows of every device: they lie in the order of receivers, and arrive in that of senders."""
        return cls(counts, starts(counts), starts(counts, axis=0))

    def back(self) -> Self:
        """Returns the way back."""
        return type(self)(self.counts.T, self.put.T, self.taken.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def send_rows(
    x: Shaped[Array, "R D"], shipment: Shipment, num_rows: int, peers: Peers, implementation: str | None = None
) -> Shaped[Array, "T D"]:
    """Returns the rows that a device receives at their places among `num_rows`, where they must fit, and zeros at the others.

    implementation: one of IMPLEMENTATIONS; by default DEFAULT's for the platform.
    """
    bound = {name: functools.partial(send, num_rows=num_rows, peers=peers) for name, send in IMPLEMENTATIONS.items()}
    return platforms.run(bound, DEFAULT, implementation, x, shipment)


def _send_forward(x, shipment, num_rows, peers, implementation):
    shape = jnp.zeros((x.shape[0], 0), x.dtype)  # residuals are arrays; this one remembers a number
    return send_rows(x, shipment, num_rows, peers, implementation), (shipment, shape)


def _send_backward(num_rows, peers, implementation, residuals, gradient):
    shipment, shape = residuals
    return send_rows(gradient, shipment.back(), shape.shape[0], peers, implementation), None


send_rows.defvjp(_send_forward, _send_backward)


def starts(sizes: Int[Array, "*n"], axis: int = -1) -> Int[Array, "*n"]:
    """Returns where each of several consecutive parts begins."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


def locate(sizes: Int[Array, " n"], num_rows: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """Returns which of several consecutive parts each row lies in, and its place there; n for rows behind the last part."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    part = jnp.searchsorted(jnp.cumsum(sizes, dtype=jnp.int32), rows, side="right").astype(jnp.int32)
    return part, rows - jnp.append(starts(sizes), 0)[part]


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _arrivals(shipment: Shipment, device: Array, num_rows: int) -> tuple[Array, Array]:
    """Returns which sender each place's row comes from, as many as there are where none does, and its number among the sender's."""
    put, counts = shipment.put[:, device], shipment.counts[:, device]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    sender = jnp.searchsorted(put + counts, rows, side="right").astype(jnp.int32)
    number = rows - jnp.append(put, 0)[sender]
    return jnp.where(number < 0, len(counts), sender), number


def _reference(x: Array, shipment: Shipment, *, num_rows: int, peers: Peers) -> Array:
    """Gathers all rows on every device, which takes its own."""
    device = peers.index()
    sender, number = _arrivals(shipment, device, num_rows)
    first = jnp.append(shipment.taken[:, device], 0)
    row = jnp.where(sender < peers.ways, sender * x.shape[0] + first[sender] + number, peers.ways * x.shape[0])
    return _rows(peers.all_gather(x).reshape(-1, x.shape[1]), row)


def _ragged_all_to_all(x: Array, shipment: Shipment, *, num_rows: int, peers: Peers) -> Array:
    """Calls XLA's operation, which CPUs lack."""
    device = peers.index()
    return lax.ragged_all_to_all(
        x,
        jnp.zeros((num_rows, x.shape[1]), x.dtype),
        shipment.taken[device],
        shipment.counts[device],
        shipment.put[device],
        shipment.counts[:, device],
        axis_name=peers.axis,
        axis_index_groups=peers.groups,
    )


def _equal_parts(x: Array, shipment: Shipment, *, num_rows: int, peers: Peers) -> Array:
    """Sends equal parts by an all-to-all, each as long as any may get."""
    device = peers.index()
    size = min(x.shape[0], num_rows)
    places = jnp.arange(size, dtype=jnp.int32)[None]
    row = jnp.where(places < shipment.counts[device][:, None], shipment.taken[device][:, None] + places, x.shape[0])
    parts = peers.all_to_all(_rows(x, row.reshape(-1)), 0, 0)
    sender, number = _arrivals(shipment, device, num_rows)
    return _rows(parts, jnp.where(sender < peers.ways, sender * size + number, peers.ways * size))


IMPLEMENTATIONS = {"reference": _reference, "ragged_all_to_all": _ragged_all_to_all, "equal_parts": _equal_parts}
DEFAULT = {"cpu": "equal_parts", "other": "ragged_all_to_all"}
