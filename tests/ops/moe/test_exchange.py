"""Rows between devices: what arrives where, what comes back, what overflows; each beside a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_switch.config import MeshConfig
from flax_switch.ops.kernels.exchange import Peers, locate, send_rows
from flax_switch.ops.moe.expert_parallel import admit, by_expert
from flax_switch.ops.moe.routing import RoutingPlan
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
        received = send_rows(x, counts, ROOM, PEERS)
        return jnp.concatenate([received, send_rows(received, counts.T, ROWS, PEERS)])

    result = np.asarray(on_devices(there_and_back)(x, COUNTS))
    np.testing.assert_array_equal(result[:, :ROOM], moved(x))
    sent = np.arange(ROWS) < COUNTS.sum(1)[:, None]
    np.testing.assert_array_equal(result[:, ROOM:], np.where(sent[..., None], x, 0))


def test_gradients_travel_back_the_way_the_rows_came():
    x = np.random.default_rng(1).normal(size=(WAYS, ROWS, D)).astype(np.float32)
    weight = np.random.default_rng(2).normal(size=(WAYS, ROOM, D)).astype(np.float32)
    send = on_devices(lambda x, counts: send_rows(x, counts, ROOM, PEERS))
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


@pytest.mark.parametrize("room", [8, 24])
def test_experts_take_choices_until_their_device_is_full(room):
    G, S, N, E = 2, 3, 2, 8  # on each of four devices
    random = np.random.default_rng(4)
    expert = np.stack([random.permutation(E)[:N] for _ in range(WAYS * G * S)]).reshape(WAYS, G, S, N).astype(np.int32)
    expert[..., 0] = np.minimum(expert[..., 0], 1)  # the first device's experts are in demand
    expert[..., 1] = np.maximum(expert[..., 1], 2)
    slot = np.zeros_like(expert)
    for w, g in np.ndindex(WAYS, G):
        queue = [0] * E
        for n, s in np.ndindex(N, S):
            slot[w, g, s, n] = queue[expert[w, g, s, n]]
            queue[expert[w, g, s, n]] += 1

    def run(choices, _):
        kept = jnp.ones((G, S, N), bool)
        plan, sent = admit(RoutingPlan(choices[0], choices[1], kept * 1.0, kept, E, None, True), PEERS, room)
        return jnp.concatenate([plan.kept.reshape(-1).astype(jnp.int32), sent.reshape(-1)])

    result = np.asarray(on_devices(run)(np.stack([expert, slot], 1), COUNTS))
    kept, sent = result[:, : G * S * N].reshape(WAYS, G, S, N), result[0, G * S * N :].reshape(WAYS, E)
    wanted, free = np.zeros((WAYS, E), int), [room] * WAYS
    for w in range(WAYS):
        for e in range(E):
            wanted[w, e] = min((expert[w] == e).sum(), free[e // 2])
            free[e // 2] -= wanted[w, e]
    np.testing.assert_array_equal(sent, wanted)
    for w, e in np.ndindex(WAYS, E):  # as many are kept as are sent, and those that came first in each group's queue
        mine = expert[w] == e
        assert kept[w][mine].sum() == wanted[w, e]
        for g in range(G):
            chosen = expert[w, g] == e
            assert (np.diff(kept[w, g][chosen][np.argsort(slot[w, g][chosen])]) <= 0).all()
    assert (kept.sum() == kept.size) == (room == 24)
