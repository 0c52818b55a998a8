"""Rows of any number between any two of several devices: `lax.ragged_all_to_all`, and the same by equal parts where it is missing.

Device s sends `counts[s, r]` rows to device r. Its rows lie in the order of their receivers, and what a device receives lies in the
order of the senders. Sending by the transposed counts brings every row back to where it was, and is the gradient too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from flax_switch.ops.moe.rows import take_rows


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices that experts are split over, as each of them sees them inside an SPMD body."""

    axis: str  # the named axis they lie on
    ways: int  # how many they are: device i of them holds the i-th part of the experts
    groups: tuple[tuple[int, ...], ...] | None = None  # indices of peers, where the axis holds others too

    def index(self) -> Int[Array, ""]:
        """Which of its peers a device is."""
        index = lax.axis_index(self.axis)
        if self.groups is None:
            return index
        places = {device: place for group in self.groups for place, device in enumerate(group)}
        return jnp.asarray([places[device] for device in range(len(places))], jnp.int32)[index]

    def all_to_all(self, x: Array, split_axis: int, concat_axis: int) -> Array:
        """Part i of `split_axis` goes to peer i; what comes is put together along `concat_axis`, by sender."""
        return lax.all_to_all(x, self.axis, split_axis, concat_axis, axis_index_groups=self.groups, tiled=True)

    def all_gather(self, x: Array) -> Array:
        """What every peer has, on a new leading axis."""
        return lax.all_gather(x, self.axis, axis_index_groups=self.groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def send_rows(x: Shaped[Array, "R D"], counts: Int[Array, "P P"], num_rows: int, peers: Peers) -> Shaped[Array, "T D"]:
    """What a device receives, in `num_rows` rows of which the last may stay empty: those are zero.

    counts: [sender, receiver], the same on all peers; no device may be sent more than `num_rows`.
    """
    ragged = functools.partial(_ragged, num_rows=num_rows, peers=peers)
    padded = functools.partial(_padded, num_rows=num_rows, peers=peers)
    return lax.platform_dependent(x, counts, cpu=padded, default=ragged)


def _send_forward(x, counts, num_rows, peers):
    shape = jnp.zeros((x.shape[0], 0), x.dtype)  # residuals are arrays; this one remembers a number
    return send_rows(x, counts, num_rows, peers), (counts, shape)


def _send_backward(num_rows, peers, residuals, gradient):
    counts, shape = residuals
    return send_rows(gradient, counts.T, shape.shape[0], peers), None


send_rows.defvjp(_send_forward, _send_backward)


def starts(sizes: Int[Array, "*n"], axis: int = -1) -> Int[Array, "*n"]:
    """Where each of several parts in a row begins."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


def _ragged(x: Array, counts: Array, *, num_rows: int, peers: Peers) -> Array:
    me = peers.index()
    return lax.ragged_all_to_all(
        x,
        jnp.zeros((num_rows, x.shape[1]), x.dtype),
        starts(counts[me]),
        counts[me],
        starts(counts, axis=0)[me],
        counts[:, me],
        axis_name=peers.axis,
        axis_index_groups=peers.groups,
    )


def _padded(x: Array, counts: Array, *, num_rows: int, peers: Peers) -> Array:
    """The same by an all-to-all of equal parts, each as long as any may get."""
    me = peers.index()
    size = min(x.shape[0], num_rows)
    places = jnp.arange(size, dtype=jnp.int32)
    index = jnp.where(places[None] < counts[me][:, None], starts(counts[me])[:, None] + places[None], x.shape[0])
    parts = take_rows(x[None], index.reshape(1, -1), None)[0]
    parts = peers.all_to_all(parts, 0, 0)
    sender, place = locate(counts[:, me], num_rows)
    return take_rows(parts[None], jnp.where(sender < peers.ways, sender * size + place, peers.ways * size)[None], None)[0]


def locate(sizes: Int[Array, " n"], num_rows: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """In which of several parts in a row each row lies, and where in it; part n behind the last."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    part = jnp.searchsorted(jnp.cumsum(sizes, dtype=jnp.int32), rows, side="right").astype(jnp.int32)
    return part, rows - jnp.append(starts(sizes), 0)[part]
