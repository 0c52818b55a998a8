"""Routing: which expert takes which token, in which slot of its queue, and with what weight.

Routers decide and executors (`flax_switch.ops.moe.executors`) execute. All routers fill the same `RoutingPlan`; losses and metrics
are computed here as well, because they judge the decision and not its execution.

Sources: Switch Transformers (2101.03961), ST-MoE (2202.08906), V-MoE (2106.05974), Expert Choice (2202.09368).
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_switch.config import SwitchConfig, check
from flax_switch.ops import Size
from flax_switch.ops.dropout import keep_mask, random_uniform
from flax_switch.ops.kept import keep_arguments
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.moe.groups import Grouping


@flax.struct.dataclass
class RoutingPlan:
    """Where every choice of every token goes.

    Where tokens choose, N is the number of experts a token chooses, best first. Where experts choose, any number of them may
    take a token: N = E, and a token's n-th choice is expert n, kept or not.
    """

    expert: Int[Array, "G S N"]  # int32, always in [0, E)
    slot: Int[Array, "G S N"]  # int32 place in the expert's queue; means nothing where not kept
    weight: Float[Array, "G S N"]  # float32, of the expert's output in the token's
    kept: Bool[Array, "G S N"]  # False: no slot was left, or the token is padding and ignored
    num_experts: int = flax.struct.field(pytree_node=False)  # E
    capacity: int | None = flax.struct.field(pytree_node=False)  # C slots per expert and group; None: dropless
    tokens_choose: bool = flax.struct.field(pytree_node=False)

    @property
    def buffer_size(self) -> Size:
        """Slots that a buffer of every expert needs: the capacity, or the whole group where the plan is dropless."""
        return self.expert.shape[1] if self.capacity is None else self.capacity


@flax.struct.dataclass
class Routed:
    """A plan and what it was made from, by group."""

    plan: RoutingPlan
    logits: Float[Array, "G S E"]
    probs: Float[Array, "G S E"]  # before any cast; zero at ignored padding
    chose: Float[Array, "G S E"]  # 1 where a token chose the expert, before capacity
    counted: Bool[Array, "G S"] | None  # False at places that only pad the last group; None: all True
    real: Bool[Array, "G S"] | None  # also False at ignored padding; None: all True
    overflowed: Float[Array, " G"] | None = None  # choices of a dropless plan that waited for their experts' device; None: 0


@flax.struct.dataclass
class RouterOutput:
    """The routing of a sparse layer: losses, metrics and choices. Losses are unweighted; the training step weighs and adds them."""

    load_balancing_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    metrics: dict[str, Array]  # see `routing_metrics`
    expert_index: Int[Array, "B L N"]  # int32; see RoutingPlan for what N and the order of choices mean
    kept: Bool[Array, "B L N"]
    expert_fraction: Float[Array, "B E"]  # f of each sequence: tokens that chose the expert, before capacity
    mean_probs: Float[Array, "B E"]  # P of each sequence: mean router probability
    logits: Float[Array, "B L E"] | None = None  # float32


def expert_capacity(config: SwitchConfig, tokens_per_group: Size, *, deterministic: bool) -> int | None:
    """Returns C, the slots of each expert in each group; None if the config is dropless.

    "factor": max(round(factor * S / E), min_expert_capacity) with Python's rounding (half to even), as flaxformer has it.
    "fixed": `config.expert_capacity`. Never more than S, since no expert can be sent more.
    """
    if config.capacity_mode == "dropless":
        return None
    if not isinstance(tokens_per_group, int):
        check(config.capacity_mode == "fixed", "A capacity that is a share of the tokens needs to know how many there are.")
        return config.expert_capacity
    if config.capacity_mode == "fixed":
        capacity = config.expert_capacity
    else:
        factor = config.eval_capacity_factor if deterministic else config.capacity_factor
        capacity = max(round(factor * tokens_per_group / config.num_experts), config.min_expert_capacity)
    return max(1, min(capacity, tokens_per_group))


def router_logits(
    x: Float[Array, "G S D"],
    kernel: Float[Array, "D E"] | Narrow,
    bias: Float[Array, " E"] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    jitter: float = 0.0,
    jitter_rng: PRNGKeyArray | None = None,
) -> Float[Array, "G S E"]:
    """Returns router logits in float32, from inputs multiplied by U(1-jitter, 1+jitter) where `jitter_rng` is given.

    Only the router sees the jittered input (2101.03961, section 2.4). The product is float32 on every backend, since a small
    change of a logit can change the expert.
    """
    noisy = jitter_rng is not None and jitter > 0.0

    def product(x: Float[Array, "G S D"], kernel: Float[Array, "D E"], rng: PRNGKeyArray | None = None) -> Float[Array, "G S E"]:
        x = x.astype(dtype)
        x = x if rng is None else x * random_uniform(rng, x.shape, 1.0 - jitter, 1.0 + jitter).astype(dtype)
        return jnp.einsum("GSD,DE->GSE", x, kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)

    if isinstance(kernel, Narrow):
        logits = kernel.multiplied(x, product)
    else:
        logits = keep_arguments(product, x, kernel, jitter_rng if noisy else None)
    return (logits if bias is None else logits + bias.astype(dtype)[None, None]).astype(jnp.float32)


def tokens_choose(
    probs: Float[Array, "G S E"],
    *,
    num_selected: int,
    capacity: int | None,
    routed: Bool[Array, "G S"] | None = None,
    batch_prioritized: bool = False,
    normalize: bool = False,
) -> RoutingPlan:
    """Plans that every token takes its `num_selected` most probable experts; the lowest index wins ties.

    Slots fill choice by choice: all first choices before any second choice, in the order of tokens, or with
    `batch_prioritized` in descending order of a token's highest probability (2106.05974, section 3).

    probs: router probabilities. routed: tokens that take part; the others keep no choice and take no slot. normalize: scale
    each token's weights to sum to 1.
    """
    num_experts = probs.shape[-1]
    _, expert = jax.lax.top_k(jax.lax.stop_gradient(probs), num_selected)
    weight = _probability_of(probs, expert)
    if normalize:
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), jnp.finfo(weight.dtype).tiny)
    priority = probs.max(-1) if batch_prioritized else None
    kept = jnp.ones(expert.shape, bool) if routed is None else jnp.broadcast_to(routed[..., None], expert.shape)
    slot = _queue_slots(jnp.where(kept, expert, num_experts), num_experts, priority)
    if capacity is not None:
        kept = kept & (slot < capacity)
    return RoutingPlan(expert, slot, weight.astype(jnp.float32), kept, num_experts, capacity, tokens_choose=True)


def _probability_of(probs: Float[Array, "G S E"], expert: Int[Array, "G S N"]) -> Float[Array, "G S N"]:
    """Returns `probs[g, s, expert[g, s, n]]` as a masked sum: its gradient needs no scatter, and it shards along G."""
    chosen = jax.nn.one_hot(expert, probs.shape[-1], dtype=bool)
    return jnp.where(chosen, probs[:, :, None, :], 0).sum(-1)


def _queue_slots(expert: Int[Array, "G S N"], num_experts: int, priority: Float[Array, "G S"] | None) -> Int[Array, "G S N"]:
    """Returns each choice's place in its expert's queue, first choices before second ones. Index `num_experts` has none."""
    G, S, N = expert.shape
    if priority is not None:
        order = jnp.argsort(-priority, axis=-1, stable=True)
        expert = jnp.take_along_axis(expert, order[..., None], axis=1)
    queue = expert.swapaxes(1, 2).reshape(G, N * S)
    # A stable sort by expert puts each queue in order; the place in it is the place among all, minus where the queue starts.
    by_expert = jnp.argsort(queue, axis=-1, stable=True).astype(jnp.int32)
    starts = (queue[..., None] < jnp.arange(num_experts + 1)[None, None]).sum(1, dtype=jnp.int32)
    slot = _inverse_permutation(by_expert) - jnp.take_along_axis(starts, queue, axis=-1)
    slot = slot.reshape(G, N, S).swapaxes(1, 2)
    if priority is not None:
        slot = jnp.take_along_axis(slot, _inverse_permutation(order)[..., None], axis=1)
    return slot


def _inverse_permutation(order: Int[Array, "G R"]) -> Int[Array, "G R"]:
    places = jnp.arange(order.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda o: jnp.zeros_like(places).at[o].set(places, unique_indices=True))(order)


def experts_choose(probs: Float[Array, "G S E"], *, capacity: int, routed: Bool[Array, "G S"] | None = None) -> RoutingPlan:
    """Plans that every expert takes its `capacity` most probable tokens (2202.09368, equation 2); the lowest index wins ties.

    routed: tokens that may be taken; the others count as improbable, and are not kept if their turn comes all the same. Not for
    decoders: a token's experts depend on later tokens.
    """
    G, S, E = probs.shape
    if routed is not None:
        probs = jnp.where(routed[..., None], probs, 0.0)
    _, token = jax.lax.top_k(jax.lax.stop_gradient(probs).swapaxes(1, 2), capacity)  # [G, E, C]
    slots = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), token.shape)
    place = jax.vmap(jax.vmap(lambda t, c: jnp.full(S, capacity, jnp.int32).at[t].set(c)))
    slot = place(token, slots).swapaxes(1, 2)
    kept = slot < capacity if routed is None else (slot < capacity) & routed[..., None]
    expert = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (G, S, E))
    return RoutingPlan(expert, slot, probs.astype(jnp.float32), kept, E, capacity, tokens_choose=False)


def expert_membership(expert: Int[Array, "G S N"], num_experts: int) -> Float[Array, "G S E"]:
    """Returns 1 where any of a token's choices is the expert, else 0."""
    return jax.nn.one_hot(expert, num_experts, dtype=bool).any(-2).astype(jnp.float32)


def load_balancing_loss(fraction: Float[Array, "G E"], mean_probs: Float[Array, "G E"]) -> Float[Array, ""]:
    """Returns E^2 times the mean over groups and experts of f * P (2101.03961, equations 4 to 6): 1 if uniform and N = 1."""
    return fraction.shape[-1] ** 2 * jnp.mean(fraction * mean_probs)


def router_z_loss(logits: Float[Array, "G S E"], counted: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """Returns mean over tokens of logsumexp(logits)^2 (2202.08906, equation 5)."""
    return token_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, counted)


Total = Callable[[Array], Array]  # adds up what every device of an SPMD program has; the identity where one has it all


def _own(x: Array) -> Array:
    return x


def token_mean(values: Float[Array, "G S"], counted: Bool[Array, "G S"] | None, total: Total = _own) -> Float[Array, ""]:
    """Returns the mean of `values` over the tokens that count, or over all."""
    if counted is None:
        return total(values.mean()) / total(jnp.ones(()))
    return total(jnp.where(counted, values, 0.0).sum()) / jnp.maximum(total(counted.sum()), 1)


def routing_metrics(
    plan: RoutingPlan, probs: Float[Array, "G S E"], counted: Bool[Array, "G S"] | None, total: Total = _own
) -> dict[str, Array]:
    """Returns what to watch while training; all float32 scalars but tokens_per_expert [E].

    fraction_tokens_left_behind: of the counted tokens, those that no expert took. router_confidence: mean weight of the choices
    kept. router_entropy: mean entropy of the router's distribution, in nats. expert_usage: share of all slots in use.
    tokens_per_expert: choices that each expert processed.
    """
    num_kept = total(plan.kept.sum().astype(jnp.float32))
    entropy = -jnp.sum(probs * jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny)), axis=-1)
    if plan.tokens_choose and plan.capacity is not None:
        usage = num_kept / (total(jnp.float32(plan.expert.shape[0])) * plan.num_experts * plan.capacity)
    else:
        usage = jnp.ones((), jnp.float32)  # no slot stays empty
    chosen = jax.nn.one_hot(plan.expert, plan.num_experts, dtype=bool) & plan.kept[..., None]
    return {
        "fraction_tokens_left_behind": token_mean((~plan.kept.any(-1)).astype(jnp.float32), counted, total),
        "router_confidence": total(jnp.where(plan.kept, plan.weight, 0.0).sum()) / jnp.maximum(num_kept, 1.0),
        "router_entropy": token_mean(entropy, counted, total),
        "expert_usage": usage,
        "tokens_per_expert": total(chosen.sum((0, 1, 2)).astype(jnp.float32)),
    }


def route(
    logits: Float[Array, "G S E"],
    *,
    config: SwitchConfig,
    causal: bool = False,
    counted: Bool[Array, "G S"] | None = None,
    mask: Bool[Array, "G S"] | None = None,
    deterministic: bool = True,
    dtype=jnp.float32,
) -> Routed:
    """Fills the plan that the config asks for.

    causal: experts-choose and batch-prioritised routing would let a token look ahead; there tokens choose, in order.
    counted: False for places added to fill a group, which never take part. mask: False for padding to ignore, or None to
    count it. "masked" padding takes no slot and has no choice; "scatter" padding has probability 0, so that it falls to the
    first experts and takes their slots, as in flaxformer's scatter router. dtype: of the activations, for cast_router_probs.
    """
    raw_probs = probs = jax.nn.softmax(logits, axis=-1)
    real = _both(counted, mask)
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, 0.0)  # as flaxformer has it: ignored padding adds ln(E)^2 to the z-loss
        probs = jnp.where(mask[..., None], probs, 0.0)
    capacity = expert_capacity(config, logits.shape[1], deterministic=deterministic)
    if config.router_type == "experts_choose" and not causal:
        assert capacity is not None  # the config refuses dropless experts-choose
        plan = experts_choose(_cast(probs, config, dtype), capacity=capacity, routed=real)
        return Routed(plan, logits, probs, plan.kept.astype(jnp.float32), counted, real)
    scatter = config.padding_semantics == "scatter"
    routed = counted if scatter else real
    plan = tokens_choose(
        _cast(probs if scatter else raw_probs, config, dtype),
        num_selected=config.num_selected_experts,
        capacity=capacity,
        routed=routed,
        batch_prioritized=config.batch_prioritized_routing and not causal,
        normalize=config.normalize_router_weights,
    )
    chosen = plan.expert
    if config.cast_router_probs:  # the loss judges the float32 choice, which ties in a narrower dtype may have changed
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), config.num_selected_experts)
    chose = expert_membership(chosen, config.num_experts)
    if routed is not None:
        chose = jnp.where(routed[..., None], chose, 0.0)
    return Routed(plan, logits, probs, chose, counted, real)


def masked(plan: RoutingPlan, rate: float, rng: PRNGKeyArray | None, *, deterministic: bool) -> RoutingPlan:
    """Returns a plan in which choices count nothing at a rate; in evaluation, where none is left out, all count 1 - rate.

    Expert output masking (2207.04672, section 6.2), unlike dropout unscaled in training.
    """
    if rate == 0.0:
        return plan
    if deterministic:
        return dataclasses.replace(plan, weight=plan.weight * (1.0 - rate))
    assert rng is not None
    return dataclasses.replace(plan, weight=jnp.where(keep_mask(rng, rate, plan.weight.shape), plan.weight, 0.0))


def _cast(probs: Float[Array, "G S E"], config: SwitchConfig, dtype: DTypeLike) -> Float[Array, "G S E"]:
    return probs.astype(dtype).astype(jnp.float32) if config.cast_router_probs else probs


def _both(a: Bool[Array, "G S"] | None, b: Bool[Array, "G S"] | None) -> Bool[Array, "G S"] | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def report(routed: Routed, grouping: Grouping, *, with_logits: bool = False, total: Total = lambda x: x) -> RouterOutput:
    """Returns losses, metrics and the choices of each token [B, L, ...].

    total: inside an SPMD body, adds up over its devices; for the metrics only.
    """
    plan, counted = routed.plan, routed.counted
    # Means are over all places of a group but those added to fill it; ignored padding counts in the denominators, as in flaxformer.
    share = 1.0 / plan.expert.shape[1] if counted is None else 1.0 / counted.sum(1, keepdims=True)
    probs = routed.probs if counted is None else jnp.where(counted[..., None], routed.probs, 0.0)
    balance = load_balancing_loss(routed.chose.sum(1) * share, probs.sum(1) * share)
    metrics = routing_metrics(plan, routed.probs, routed.real, total)
    overflowed = jnp.zeros((), jnp.float32) if routed.overflowed is None else total(routed.overflowed.sum())
    return RouterOutput(
        load_balancing_loss=balance if plan.tokens_choose else jnp.zeros((), jnp.float32),
        z_loss=router_z_loss(routed.logits, counted),
        metrics={**metrics, "choices_overflowed": overflowed},
        expert_index=grouping.ungroup(plan.expert),
        kept=grouping.ungroup(plan.kept),
        expert_fraction=grouping.ungroup(routed.chose).mean(1),
        mean_probs=grouping.ungroup(routed.probs).mean(1),
        logits=grouping.ungroup(routed.logits) if with_logits else None,
    )
