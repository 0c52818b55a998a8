"""A sparse MLP as one pure function: group, route, execute, and report."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flax_switch.config import SwitchConfig
from flax_switch.ops import routing
from flax_switch.ops.dispatch import execute_buffers, pick_executor
from flax_switch.ops.experts import mlp
from flax_switch.ops.grouped import batched_matmul
from flax_switch.ops.groups import Grouping, make_grouping
from flax_switch.ops.ragged import execute_ragged
from flax_switch.ops.routing import RouterOutput, RoutingPlan


@flax.struct.dataclass
class MoEParams:
    """The arrays of one sparse MLP."""

    router_kernel: Float[Array, "D E"]
    router_bias: Float[Array, " E"] | None
    expert: Mapping[str, Array]  # {"wi" | "wi_0", "wi_1": [E, D, F], "wo": [E, F, D]}
    shared_expert: Mapping[str, Array] | None = None  # the same without E


@flax.struct.dataclass
class Routed:
    """A plan and what it was made from, by group."""

    plan: RoutingPlan
    logits: Float[Array, "G S E"]
    probs: Float[Array, "G S E"]  # before any cast; zero at ignored padding
    chose: Float[Array, "G S E"]  # 1 where a token chose the expert, before capacity
    counted: Bool[Array, "G S"] | None  # places that are no filling of the last group; None: all
    real: Bool[Array, "G S"] | None  # and no ignored padding; None: all


def moe_block(
    params: MoEParams,
    x: Float[Array, "B L D"],
    *,
    config: SwitchConfig,
    stack: str,
    padding_mask: Bool[Array, "B L"] | None,
    deterministic: bool,
    jitter_rng: PRNGKeyArray | None = None,
    dropout_rng: PRNGKeyArray | None = None,
    replicas: int = 1,
    with_logits: bool = False,
) -> tuple[Float[Array, "B L D"], RouterOutput]:
    """Routes each token to its experts and returns their weighted answers, zero for tokens that no expert took.

    config, stack: the stack ("encoder" or "decoder") matters because experts-choose and batch-prioritised routing would let a
    decoder look ahead; there tokens choose, in order. padding_mask: True for real tokens; used only where
    `config.ignore_padding_tokens`. deterministic: evaluation's capacity, no jitter, no dropout. The generators are needed only
    where the config's rates are not 0. replicas: see `ops.groups`.
    """
    grouping = make_grouping(config, *x.shape[:2], replicas=replicas)
    tokens = grouping.group(x)
    logits = routing.router_logits(
        tokens,
        params.router_kernel,
        params.router_bias,
        dtype=config.router_dtype,
        jitter=config.router_jitter_noise,
        jitter_rng=None if deterministic else jitter_rng,
    )
    mask = grouping.group(padding_mask) if config.ignore_padding_tokens and padding_mask is not None else None
    routed = route(
        logits, config=config, stack=stack, counted=grouping.counted(), mask=mask, deterministic=deterministic, dtype=x.dtype
    )
    expert_dtype = jnp.dtype(config.expert_dtype or config.dtype)
    dropout_rate = config.dropout_rate if config.expert_dropout_rate is None else config.expert_dropout_rate
    experts = functools.partial(
        mlp,
        activations=config.mlp_activations,
        dropout_rate=dropout_rate,
        dropout_rng=None if deterministic else dropout_rng,
    )
    y = execute(
        routed.plan, tokens.astype(expert_dtype), params.expert, experts,
        executor=pick_executor(config.moe_executor, routed.plan, config.expert_width),
    )  # fmt: skip
    y = grouping.ungroup(y).astype(x.dtype)
    if params.shared_expert is not None:
        if experts.keywords["dropout_rng"] is not None:
            experts = functools.partial(experts, dropout_rng=jax.random.fold_in(dropout_rng, 1))
        y = y + experts(x.astype(expert_dtype), params.shared_expert, matmul=jnp.matmul).astype(x.dtype)
    return y, report(routed, grouping, with_logits=with_logits)


def execute(plan: RoutingPlan, x: Float[Array, "G S D"], kernels: Mapping[str, Array], experts, *, executor: str):
    """Runs the plan with one of the executors; `experts` is `ops.experts.mlp` with all but its product settled."""
    if executor == "ragged":
        return execute_ragged(plan, x, kernels, experts)
    run = functools.partial(experts, kernels=kernels, matmul=batched_matmul)
    return execute_buffers(plan, x, run, executor=executor)


def route(
    logits: Float[Array, "G S E"],
    *,
    config: SwitchConfig,
    stack: str,
    counted: Bool[Array, "G S"] | None = None,
    mask: Bool[Array, "G S"] | None = None,
    deterministic: bool = True,
    dtype=jnp.float32,
) -> Routed:
    """Fills the plan that the config asks for.

    counted: False for places added to fill a group, which never take part. mask: False for padding to ignore, or None to
    count it. "masked" padding takes no slot and has no choice; "scatter" padding has probability 0, so that it falls to the
    first experts and takes their slots, as in flaxformer's scatter router. dtype: of the activations, for cast_router_probs.
    """
    raw_probs = probs = jax.nn.softmax(logits, axis=-1)
    real = _both(counted, mask)
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, 0.0)  # as flaxformer has it: ignored padding adds ln(E)^2 to the z-loss
        probs = jnp.where(mask[..., None], probs, 0.0)
    capacity = routing.expert_capacity(config, logits.shape[1], deterministic=deterministic)
    if config.router_type == "experts_choose" and stack == "encoder":
        plan = routing.experts_choose(_cast(probs, config, dtype), capacity=capacity, routed=real)
        return Routed(plan, logits, probs, plan.kept.astype(jnp.float32), counted, real)
    scatter = config.padding_semantics == "scatter"
    routed = counted if scatter else real
    plan = routing.tokens_choose(
        _cast(probs if scatter else raw_probs, config, dtype),
        num_selected=config.num_selected_experts,
        capacity=capacity,
        routed=routed,
        batch_prioritized=config.batch_prioritized_routing and stack == "encoder",
        normalize=config.normalize_router_weights,
    )
    chosen = plan.expert
    if config.cast_router_probs:  # the loss judges the float32 choice, which ties in a narrower dtype may have changed
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), config.num_selected_experts)
    chose = routing.expert_membership(chosen, config.num_experts)
    if routed is not None:
        chose = jnp.where(routed[..., None], chose, 0.0)
    return Routed(plan, logits, probs, chose, counted, real)


def _cast(probs: Float[Array, "G S E"], config: SwitchConfig, dtype) -> Float[Array, "G S E"]:
    return probs.astype(dtype).astype(jnp.float32) if config.cast_router_probs else probs


def _both(a: Bool[Array, "G S"] | None, b: Bool[Array, "G S"] | None) -> Bool[Array, "G S"] | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def report(routed: Routed, grouping: Grouping, *, with_logits: bool = False) -> RouterOutput:
    """Losses, metrics and the choices of each token, by batch and length again."""
    plan, counted = routed.plan, routed.counted
    # Means are over all places of a group but its filling: ignored padding stays in the denominators, as in flaxformer.
    share = 1.0 / plan.expert.shape[1] if counted is None else 1.0 / counted.sum(1, keepdims=True)
    probs = routed.probs if counted is None else jnp.where(counted[..., None], routed.probs, 0.0)
    balance = routing.load_balancing_loss(routed.chose.sum(1) * share, probs.sum(1) * share)
    return RouterOutput(
        load_balancing_loss=balance if plan.tokens_choose else jnp.zeros((), jnp.float32),
        z_loss=routing.router_z_loss(routed.logits, counted),
        metrics=routing.routing_metrics(plan, routed.probs, routed.real),
        expert_index=grouping.ungroup(plan.expert),
        kept=grouping.ungroup(plan.kept),
        expert_fraction=grouping.ungroup(routed.chose).mean(1),
        mean_probs=grouping.ungroup(routed.probs).mean(1),
        logits=grouping.ungroup(routed.logits) if with_logits else None,
    )
