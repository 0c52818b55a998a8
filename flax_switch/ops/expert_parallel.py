"""Experts on several devices: tokens travel to their experts and back; the experts' weights stay where they are.

One SPMD body, the same under `jax.shard_map` and `jax.pmap`. A device routes its own groups and talks to its peers only here:

    capacity    buffers [G, E, C, D] go out by one all-to-all, and the answers come back by another
    dropless    rows sorted by expert go out and come back by ragged all-to-alls, after each device has told how many it has

Gradients take the same ways backwards. What was received is named, so that remat policies keep it and nothing is sent again.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from flax_switch.ops.dispatch import ExpertFunction
from flax_switch.ops.permute import take_rows
from flax_switch.ops.ragged import SortedExperts, execute_ragged
from flax_switch.ops.ragged_exchange import Peers, locate, send_rows, starts
from flax_switch.ops.routing import RoutingPlan

# Names of the activations that crossed devices.
EXCHANGED = ("tokens_at_their_experts", "answers_at_their_tokens")


def exchange_buffers(experts: ExpertFunction, peers: Peers) -> ExpertFunction:
    """`experts`, which knows this device's share of the experts, as a function of buffers for all of them."""

    def run(buffers: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        received = peers.all_to_all(buffers, 1, 0)  # [ways * G, E / ways, C, D]
        answers = experts(checkpoint_name(received, EXCHANGED[0]))
        return checkpoint_name(peers.all_to_all(answers, 0, 1), EXCHANGED[1])

    return run


def execute_dropless(
    plan: RoutingPlan, x: Float[Array, "G S D"], experts: SortedExperts, peers: Peers, *, buffer_factor: float
) -> tuple[Float[Array, "G S D"], RoutingPlan]:
    """Executes a dropless plan of tokens that choose; `experts` is for this device's share of them.

    A device holds room for `buffer_factor` times its even share of rows. Choices beyond it are dropped, the last sender's first:
    they are not kept in the plan that is returned.
    """
    num_choices = math.prod(plan.expert.shape)
    room = min(peers.ways * num_choices, 8 * math.ceil(buffer_factor * num_choices / 8))
    plan, counts = admit(plan, peers, room)
    local = lax.dynamic_index_in_dim(counts.reshape(peers.ways, peers.ways, -1), peers.index(), 1, keepdims=False)
    between = counts.reshape(peers.ways, peers.ways, -1).sum(-1)  # [sender, receiver]

    def run(rows: Float[Array, "R D"], _: Int[Array, " E"]) -> Float[Array, "R D"]:
        received = checkpoint_name(send_rows(rows, between, room, peers), EXCHANGED[0])
        order, inverse = by_expert(local, room)
        sorted_rows = take_rows(received[None], order[None], inverse[None, :, None])[0]
        answers = experts(sorted_rows, local.sum(0, dtype=jnp.int32))
        answers = take_rows(answers[None], inverse[None], order[None, :, None])[0]
        return checkpoint_name(send_rows(answers, between.T, rows.shape[0], peers), EXCHANGED[1])

    return execute_ragged(plan, x, run), plan


def admit(plan: RoutingPlan, peers: Peers, room: int) -> tuple[RoutingPlan, Int[Array, "P E"]]:
    """The plan without the choices for which their experts' device has no room, and the rows every peer sends each expert."""
    G, _, N = plan.expert.shape
    chosen = jax.nn.one_hot(jnp.where(plan.kept, plan.expert, plan.num_experts).reshape(G, -1), plan.num_experts, dtype=bool)
    by_group = chosen.sum(1, dtype=jnp.int32)  # [G, E]
    wanted = peers.all_gather(by_group.sum(0, dtype=jnp.int32))  # [P, E]
    # A receiver takes senders in order, and of each its experts in order, until it is full.
    by_receiver = wanted.reshape(peers.ways, peers.ways, -1).swapaxes(0, 1)  # [receiver, sender, experts of the receiver]
    flat = by_receiver.reshape(peers.ways, -1)
    admitted = jnp.clip(room - starts(flat), 0, flat).reshape(by_receiver.shape).swapaxes(0, 1).reshape(wanted.shape)
    # A choice's place among all that this device sends its expert: its slot counts those of its own group only.
    earlier_groups = starts(by_group, axis=0)
    place = plan.slot + _at_expert(earlier_groups, plan)
    limit = lax.dynamic_index_in_dim(admitted, peers.index(), 0, keepdims=True)
    kept = plan.kept & (place < _at_expert(jnp.broadcast_to(limit, by_group.shape), plan))
    return dataclasses.replace(plan, kept=kept), admitted


def _at_expert(values: Int[Array, "G E"], plan: RoutingPlan) -> Int[Array, "G S N"]:
    """`values[g, expert[g, s, n]]`."""
    G, S, N = plan.expert.shape
    return jnp.take_along_axis(values, plan.expert.reshape(G, S * N), axis=1).reshape(G, S, N)


def by_expert(counts: Int[Array, "P E"], num_rows: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """The order that puts rows that lie by sender and then expert into the order of experts and then senders, and its inverse.

    counts: rows from each sender to each expert of this device. Rows behind the last are `num_rows` in both.
    """

    def reorder(counts: Int[Array, "a b"]) -> Int[Array, " R"]:
        """For rows in the order of b and then a, where each is in the order of a and then b."""
        other = jnp.append(starts(counts.reshape(-1)).reshape(counts.shape).T.reshape(-1), 0)
        part, place = locate(counts.T.reshape(-1), num_rows)
        return jnp.where(part < counts.size, other[part] + place, num_rows)

    return reorder(counts), reorder(counts.T)
