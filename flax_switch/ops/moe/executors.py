"""Executing a routing plan: tokens to experts and back. Five executors, one result, one set of gradients.

    einsum    one-hot masks: the readable reference
    gather    rows by index into buffers of static capacity, one batched GEMM over the experts
    ragged    dropless: rows sorted by expert and a grouped GEMM
    blocks    as `ragged`, in plain XLA on every platform and for any number of tokens: what is exported
    hit       a few tokens, as in decoding: reads only the experts that some token chose

`einsum` and `gather` fill the same buffers `[G, E, C, D]`; dispatch and combine are apart so that an expert-parallel body can
exchange buffers between devices in between.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from flax_switch.config import check
from flax_switch.ops.moe.routing import RoutingPlan
from flax_switch.ops.moe.rows import sum_rows, take_rows, weighted


@flax.struct.dataclass
class SlotView:
    """The plan seen from the experts' slots, R = E * C of them in a row, slot c of expert e at e * C + c."""

    token: Int[Array, "G R"]  # the token in the slot; S where empty
    choice: Int[Array, "G R"]  # which of its choices, s * N + n; S * N where empty
    slot_of_token: Int[Array, "G S N"] | None  # the inverse of `token`, R where dropped; None where experts choose
    slot_of_choice: Int[Array, "G SN 1"]  # the inverse of `choice`


def slot_view(plan: RoutingPlan) -> SlotView:
    """Turns "token s is in slot c of expert e" around: which token is in it."""
    G, S, N = plan.expert.shape
    num_slots = plan.num_experts * plan.buffer_size
    position = jnp.where(plan.kept, plan.expert * plan.buffer_size + plan.slot, num_slots)
    choices = jnp.arange(S * N, dtype=jnp.int32)
    fill = jax.vmap(lambda p: jnp.full(num_slots, S * N, jnp.int32).at[p].set(choices, mode="drop"))
    choice = fill(position.reshape(G, S * N))
    # Where experts choose, N is E: gathering every expert's output for every token would move E / C times too many rows.
    inverse = position if plan.tokens_choose else None
    return SlotView(choice // N, choice, inverse, position.reshape(G, S * N, 1))


def slot_weights(plan: RoutingPlan, view: SlotView) -> Float[Array, "G R 1"]:
    """Returns the combine weight of the choice in each slot; 0 where empty."""
    return take_rows(plan.weight.reshape(plan.weight.shape[0], -1, 1), view.choice, view.slot_of_choice)


def gather_dispatch(plan: RoutingPlan, view: SlotView, x: Float[Array, "G S D"]) -> Float[Array, "G E C D"]:
    """Copies every token into its slots; empty slots are zero."""
    rows = take_rows(x, view.token, view.slot_of_token)
    return rows.reshape(x.shape[0], plan.num_experts, plan.buffer_size, x.shape[-1])


def gather_combine(plan: RoutingPlan, view: SlotView, buffers: Float[Array, "G E C D"]) -> Float[Array, "G S D"]:
    """Adds up the expert outputs of each token, weighted, in float32."""
    rows = buffers.reshape(buffers.shape[0], -1, buffers.shape[-1])
    return sum_rows(weighted(rows, slot_weights(plan, view)), view.token, view.slot_of_token, plan.expert.shape[1])


def einsum_masks(plan: RoutingPlan, dtype: DTypeLike) -> tuple[Num[Array, "G S E C"], Float[Array, "G S E C"]]:
    """Returns the dispatch mask (1 where slot c of expert e has token s) in `dtype`, and in float32 the same times weights."""
    if plan.tokens_choose:
        chosen = jax.nn.one_hot(plan.expert, plan.num_experts, dtype=bool) & plan.kept[..., None]  # [G, S, N, E]
        position = jnp.where(chosen, plan.slot[..., None], 0).sum(2)
        weight = jnp.where(chosen, plan.weight[..., None], 0.0).sum(2)
        taken = chosen.any(2)
    else:
        position, weight, taken = plan.slot, plan.weight, plan.kept
    mask = taken[..., None] & jax.nn.one_hot(position, plan.buffer_size, dtype=bool)
    return mask.astype(dtype), jnp.where(mask, weight[..., None], 0.0)


ExpertFunction = Callable[[Float[Array, "G E C D"]], Float[Array, "G E C D_out"]]


def execute_buffers(
    plan: RoutingPlan, x: Float[Array, "G S D"], experts: ExpertFunction, *, executor: str
) -> Float[Array, "G S D_out"]:
    """Runs `einsum` or `gather`: dispatch, `experts` on the buffers, combine. The result has x's dtype."""
    if executor == "einsum":
        dispatch_mask, combine_weights = einsum_masks(plan, x.dtype)
        outputs = experts(jnp.einsum("GSEC,GSD->GECD", dispatch_mask, x))
        return jnp.einsum("GSEC,GECD->GSD", combine_weights, outputs.astype(jnp.float32)).astype(x.dtype)
    check(executor == "gather", f"buffers are filled by 'einsum' or 'gather', not by {executor!r}.")
    view = slot_view(plan)
    return gather_combine(plan, view, experts(gather_dispatch(plan, view, x))).astype(x.dtype)


SortedExperts = Callable[[Float[Array, "R D"], Int[Array, " E"]], Float[Array, "R D_out"]]  # rows and group sizes to outputs


@flax.struct.dataclass
class SortedView:
    """The plan seen from its kept choices, sorted by expert, all groups together: R rows, the last of which may be empty."""

    token: Int[Array, "1 R"]  # the token of a row; behind the last as many as there are tokens, or more
    row_of_token: Int[Array, "1 T N"] | None  # the inverse of `token`, R where dropped; None where experts choose
    choice: Int[Array, "1 R"]  # which of all choices
    row_of_choice: Int[Array, "1 TN 1"]
    group_sizes: Int[Array, " E"]

    def rows(self, x: Float[Array, "G S D"]) -> Float[Array, "R D"]:
        """Returns the tokens of the rows."""
        return take_rows(x.reshape(1, -1, x.shape[-1]), self.token, self.row_of_token)[0]

    def combined(self, plan: RoutingPlan, outputs: Float[Array, "R D"]) -> Float[Array, "G S D"]:
        """Adds up the weighted outputs of each token's rows, in float32."""
        G, S, _ = plan.expert.shape
        weight = take_rows(plan.weight.reshape(1, -1, 1), self.choice, self.row_of_choice)
        return sum_rows(weighted(outputs[None], weight), self.token, self.row_of_token, G * S).reshape(G, S, outputs.shape[-1])


def sorted_view(plan: RoutingPlan) -> SortedView:
    """Sorts the kept choices of all groups by expert."""
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
    row_of_token = row_of_choice.reshape(1, G * S, N) if plan.tokens_choose else None
    return SortedView(choice[None] // N, row_of_token, choice[None], row_of_choice.reshape(1, -1, 1), group_sizes)


def execute_ragged(plan: RoutingPlan, x: Float[Array, "G S D"], experts: SortedExperts) -> Float[Array, "G S D_out"]:
    """Sorts the kept choices of all groups by expert, runs `experts` on the sorted rows, and adds up their outputs."""
    view = sorted_view(plan)
    return view.combined(plan, experts(view.rows(x), view.group_sizes)).astype(x.dtype)


HitExperts = Callable[[Float[Array, "R D"], Int[Array, "R N"]], Float[Array, "R N D_out"]]  # rows and their experts to outputs


def execute_hit(plan: RoutingPlan, x: Float[Array, "G S D"], experts: HitExperts) -> Float[Array, "G S D_out"]:
    """Runs `experts` on every choice of every token, kept or not, and adds up the outputs of those kept. For few tokens."""
    G, S, N = plan.expert.shape
    weight = jnp.where(plan.kept, plan.weight, 0.0).reshape(G * S, N, 1)
    outputs = experts(x.reshape(G * S, -1), plan.expert.reshape(G * S, N))
    return (outputs * weight).sum(1).reshape(G, S, outputs.shape[-1]).astype(x.dtype)
