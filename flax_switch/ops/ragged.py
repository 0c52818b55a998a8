"""Dropless execution: rows sorted by expert, and one grouped product per kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_switch.ops.permute import sum_rows, take_rows
from flax_switch.ops.routing import RoutingPlan

SortedExperts = Callable[[Float[Array, "R D"], Int[Array, " E"]], Float[Array, "R D"]]  # rows and group sizes to answers


def execute_ragged(plan: RoutingPlan, x: Float[Array, "G S D"], experts: SortedExperts) -> Float[Array, "G S D"]:
    """Sorts the kept choices of all groups by expert, runs `experts` on the sorted rows, and adds up the answers."""
    G, S, N = plan.expert.shape
    num_choices = G * S * N
    num_rows = num_choices if plan.tokens_choose else G * plan.num_experts * plan.buffer_size
    key = jnp.where(plan.kept, plan.expert, plan.num_experts).reshape(num_choices)
    choice = jnp.argsort(key, stable=True)[:num_rows].astype(jnp.int32)  # what was not kept comes last
    group_sizes = jax.nn.one_hot(key, plan.num_experts, dtype=jnp.int32).sum(0)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    used = rows < group_sizes.sum()
    choice = jnp.where(used, choice, num_choices)
    row_of_choice = jnp.full(num_choices, num_rows, jnp.int32).at[choice].set(rows, mode="drop")
    token, row_of_token = choice[None] // N, None
    if plan.tokens_choose:
        row_of_token = row_of_choice.reshape(1, G * S, N)

    sorted_rows = take_rows(x.reshape(1, G * S, -1), token, row_of_token)[0]
    answers = experts(sorted_rows, group_sizes)
    weight = take_rows(plan.weight.reshape(1, -1, 1), choice[None], row_of_choice.reshape(1, -1, 1))
    return sum_rows(answers[None] * weight, token, row_of_token, G * S).reshape(x.shape).astype(x.dtype)
