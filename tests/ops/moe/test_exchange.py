"""Rows between devices: what arrives where, what comes back, which round serves a row; each beside a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_switch.config import MeshConfig
from flax_switch.ops.kernels.exchange import Peers, Shipment, locate, send_rows
from flax_switch.ops.moe.expert_parallel import by_expert, in_round
from flax_switch.parallel.mesh import create_mesh

WAYS, ROWS, ROOM, D = 4, 9, 20, 3
COUNTS = np.asarray([[3, 0, 2, 4], [0, 0, 0, 0], [5, 1, 1, 0], [2, 2, 2, 3]], np.int32)  # [sender, receiver]
PEERS = Peers("expert", WAYS)


def on_devices(function, ways=WAYS):
    """`function` of one device's part of the first argument, and of the whole second."""
    mesh = create_mesh(MeshConfig(data=1, expert=ways), jax.devices()[:ways])
    specs = dict(in_specs=(P("expert"), P()), out_specs=P("expert"), check_vma=False)
    return jax.jit(jax.shard_map(lambda x, y: function(x[0], y)[None], mesh=mesh, **specs))


def moved(x):
    """What each device receives: rows by sender, and zeros."""
    wanted = np.zeros((WAYS, ROOM, D), np.float32)
    for receiver in range(WAYS):
        parts = [x[s, COUNTS[s, :receiver].sum() :][: COUNTS[s, receiver]] for s in range(WAYS)]
        rows = np.concatenate(parts)
        wanted[receiver, : len(rows)] = rows
    return wanted


def test_rows_arrive_by_sender_and_come_back_to_their_places():
    x = np.random.default_rng(0).normal(size=(WAYS, ROWS, D)).astype(np.float32)

    def there_and_back(x, counts):
        shipment = Shipment.of_all(counts)
        received = send_rows(x, shipment, ROOM, PEERS)
        return jnp.concatenate([received, send_rows(received, shipment.back(), ROWS, PEERS)])

    result = np.asarray(on_devices(there_and_back)(x, COUNTS))
    np.testing.assert_array_equal(result[:, :ROOM], moved(x))
    sent = np.arange(ROWS) < COUNTS.sum(1)[:, None]
    np.testing.assert_array_equal(result[:, ROOM:], np.where(sent[..., None], x, 0))


def test_gradients_travel_back_the_way_the_rows_came():
    x = np.random.default_rng(1).normal(size=(WAYS, ROWS, D)).astype(np.float32)
    weight = np.random.default_rng(2).normal(size=(WAYS, ROOM, D)).astype(np.float32)
    send = on_devices(lambda x, counts: send_rows(x, Shipment.of_all(counts), ROOM, PEERS))
    gradient = jax.jit(jax.grad(lambda x: (send(x, COUNTS) * weight).sum()))(x)
    wanted = np.zeros_like(x)
    for index in np.ndindex(WAYS, ROWS, D):  # moving is linear: the gradient is what each row's unit finds in the weights
        unit = np.zeros_like(x)
        unit[index] = 1
        wanted[index] = (moved(unit) * weight).sum()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_rows_by_sender_are_put_in_the_order_of_experts_and_back():
    counts = np.random.default_rng(3).integers(0, 4, (3, 5)).astype(np.int32)  # [sender, expert]
    rows = [(s, e, i) for s in range(3) for e in range(5) for i in range(counts[s, e])]
    order, inverse = jax.jit(functools.partial(by_expert, num_rows=60))(counts)
    wanted = [rows.index(row) for row in sorted(rows, key=lambda row: (row[1], row[0], row[2]))]
    np.testing.assert_array_equal(order, wanted + [60] * (60 - len(rows)))
    np.testing.assert_array_equal(np.asarray(inverse)[order[: len(rows)]], np.arange(len(rows)))
    part, place = locate(jnp.asarray([2, 0, 1]), 4)
    np.testing.assert_array_equal(part, [0, 0, 2, 3])
    np.testing.assert_array_equal(place[:3], [0, 1, 0])


@pytest.mark.parametrize("room", [1, 8, 24])
def test_a_device_is_sent_its_rows_in_rounds_of_as_many_as_it_has_room_for(room):
    """Each row once, in the order of senders, and of a sender in that of experts."""
    E = 8
    wanted = np.random.default_rng(4).integers(0, 6, (WAYS, E)).astype(np.int32)
    wanted[:, :2] += 5  # the first device's experts are in demand
    places = np.concatenate([np.zeros((WAYS, 1), int), wanted.cumsum(1)], 1)  # where an expert's rows begin at their sender
    rows_of = lambda s, e: [(s, e, places[s, e] + i) for i in range(wanted[s, e])]  # noqa: E731
    queues = [sum((rows_of(s, e) for s in range(WAYS) for e in (2 * r, 2 * r + 1)), []) for r in range(WAYS)]
    rounds = -(-max(map(len, queues)) // room)
    for number in range(rounds + 1):  # and one in which there is nothing left
        shipment, counts = jax.jit(in_round, static_argnums=2)(number, wanted, room)
        for r in range(WAYS):
            served = queues[r][number * room : (number + 1) * room]
            counted, taken, put = (np.asarray(field)[:, r] for field in shipment)
            sent = [(s, taken[s] + i, put[s] + i) for s in range(WAYS) for i in range(counted[s])]
            assert sent == [(s, row, place) for place, (s, _, row) in enumerate(served)]
            of_experts = [[sum(1 for s, e, _ in served if (s, e) == (w, 2 * r + i)) for i in (0, 1)] for w in range(WAYS)]
            np.testing.assert_array_equal(counts[:, r], of_experts)
    assert rounds > 1
