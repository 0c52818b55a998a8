"""A sparse MLP as one pure function: group, route, execute, and report."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flax_switch.config import SwitchConfig
from flax_switch.ops import routing
from flax_switch.ops.dispatch import ExpertFunction, execute_buffers, pick_executor
from flax_switch.ops.expert_parallel import exchange_buffers, execute_dropless
from flax_switch.ops.experts import mlp
from flax_switch.ops.grouped import batched_matmul, grouped_matmul
from flax_switch.ops.groups import Grouping, make_grouping
from flax_switch.ops.ragged import SortedExperts, execute_ragged
from flax_switch.ops.ragged_exchange import Peers
from flax_switch.ops.routing import RouterOutput, RoutingPlan
from flax_switch.ops.spmd import fits_mesh, over_mesh, own_groups, pmap_peers
from flax_switch.partitioning import PmapDevices


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
    overflowed: Float[Array, " G"] | None = None  # choices of a dropless plan that did not fit their experts' device; None: 0


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
    devices: AbstractMesh | PmapDevices | None = None,
) -> tuple[Float[Array, "B L D"], RouterOutput]:
    """Routes each token to its experts and returns their weighted answers, zero for tokens that no expert took.

    config, stack: the stack ("encoder" or "decoder") matters because experts-choose and batch-prioritised routing would let a
    decoder look ahead; there tokens choose, in order. padding_mask: True for real tokens; used only where
    `config.ignore_padding_tokens`. deterministic: evaluation's capacity, no jitter, no dropout. The generators are needed only
    where the config's rates are not 0. replicas: see `ops.groups`. devices: where the program runs, if on several: groups are then
    routed where they lie and tokens sent to the devices of their experts (`ops.expert_parallel`). Inside a pmap x and the experts'
    kernels are a device's own, losses are those of its own groups, and metrics those of all devices.
    """
    if deterministic:
        jitter_rng = dropout_rng = None
    parts = devices.size if isinstance(devices, PmapDevices) else 1
    grouping = make_grouping(config, x.shape[0] * parts, x.shape[1], replicas=replicas)
    mask = padding_mask if config.ignore_padding_tokens else None
    arrays = (dataclasses.replace(params, shared_expert=None), x, mask, jitter_rng, dropout_rng)
    body = functools.partial(route_and_execute, config=config, stack=stack, deterministic=deterministic)
    total = {}
    if isinstance(devices, PmapDevices):
        grouping = own_groups(grouping, parts)
        total = {"total": devices.sum}
        y, routed = body(*arrays, grouping=grouping, peers=pmap_peers(devices))
    elif devices is not None and fits_mesh(grouping, devices):
        y, routed = over_mesh(body, arrays, devices, grouping, dtype=expert_dtype(config))
    else:
        y, routed = body(*arrays, grouping=grouping)
    if params.shared_expert is not None:
        experts = expert_function(config, None if dropout_rng is None else jax.random.fold_in(dropout_rng, 1))
        y = y + experts(x.astype(expert_dtype(config)), params.shared_expert, matmul=jnp.matmul).astype(x.dtype)
    return y, report(routed, grouping, with_logits=with_logits, **total)


def expert_dtype(config: SwitchConfig) -> jnp.dtype:
    """The dtype that experts compute in, and that tokens travel in."""
    return jnp.dtype(config.expert_dtype or config.dtype)


def expert_function(config: SwitchConfig, dropout_rng: PRNGKeyArray | None) -> Callable[..., Array]:
    """`ops.experts.mlp` with all but rows, kernels and product settled."""
    rate = config.dropout_rate if config.expert_dropout_rate is None else config.expert_dropout_rate
    return functools.partial(mlp, activations=config.mlp_activations, dropout_rate=rate, dropout_rng=dropout_rng)


def route_and_execute(
    params: MoEParams,
    x: Float[Array, "B L D"],
    mask: Bool[Array, "B L"] | None,
    jitter_rng: PRNGKeyArray | None,
    dropout_rng: PRNGKeyArray | None,
    *,
    config: SwitchConfig,
    stack: str,
    deterministic: bool,
    grouping: Grouping,
    peers: Peers | None = None,
) -> tuple[Float[Array, "B L D"], Routed]:
    """The SPMD body: what one device does with its tokens, alone or with the `peers` among which experts are split."""
    tokens = grouping.group(x)
    logits = routing.router_logits(
        tokens,
        params.router_kernel,
        params.router_bias,
        dtype=config.router_dtype,
        jitter=config.router_jitter_noise,
        jitter_rng=jitter_rng,
    )
    routed = route(
        logits,
        config=config,
        stack=stack,
        counted=grouping.counted(),
        mask=None if mask is None else grouping.group(mask),
        deterministic=deterministic,
        dtype=x.dtype,
    )
    executor = pick_executor(config.moe_executor, routed.plan)
    tokens, experts = tokens.astype(expert_dtype(config)), expert_function(config, dropout_rng)
    if peers is None or peers.ways == 1:
        run = functools.partial(execute, routed.plan, kernels=params.expert, experts=experts)
        if config.moe_executor == "auto" and mostly_empty(routed.plan, config.num_experts):
            y = jax.lax.platform_dependent(
                tokens, cpu=functools.partial(run, executor="ragged"), default=functools.partial(run, executor=executor)
            )
        else:
            y = run(tokens, executor=executor)
    elif routed.plan.capacity is None and executor == "ragged":
        run, factor = grouped_experts(experts, params.expert), config.expert_parallel_buffer_factor
        y, plan = execute_dropless(routed.plan, tokens, run, peers, buffer_factor=factor)
        overflowed = (routed.plan.kept & ~plan.kept).sum((1, 2)).astype(jnp.float32)
        routed = dataclasses.replace(routed, plan=plan, overflowed=overflowed)
    else:  # whatever has a capacity travels in buffers
        run = exchange_buffers(buffered_experts(experts, params.expert), peers)
        y = execute_buffers(routed.plan, tokens, run, executor="einsum" if executor == "einsum" else "gather")
    return grouping.ungroup(y).astype(x.dtype), routed


def mostly_empty(plan: RoutingPlan, num_experts: int) -> bool:
    """Whether buffers have more than 1.5 places for each choice, so that a processor does better to sort the tokens.

    Hugging Face's fixed capacity of 64 tokens is such a case: 8 experts have 512 places for a sequence of 256.
    """
    _, S, N = plan.expert.shape
    return plan.tokens_choose and plan.capacity is not None and num_experts * plan.capacity > 1.5 * S * N


def execute(plan: RoutingPlan, x: Float[Array, "G S D"], kernels: Mapping[str, Array], experts, *, executor: str):
    """Runs the plan with one of the executors; `experts` is `ops.experts.mlp` with all but its product settled."""
    if executor == "ragged":
        return execute_ragged(plan, x, grouped_experts(experts, kernels))
    return execute_buffers(plan, x, buffered_experts(experts, kernels), executor=executor)


def grouped_experts(experts, kernels: Mapping[str, Array]) -> SortedExperts:
    """`experts` as a function of sorted rows and their group sizes."""
    return lambda rows, sizes: experts(rows, kernels, matmul=functools.partial(grouped_matmul, group_sizes=sizes))


def buffered_experts(experts, kernels: Mapping[str, Array]) -> ExpertFunction:
    """`experts` as a function of buffers of equal size."""
    return functools.partial(experts, kernels=kernels, matmul=batched_matmul)


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
        assert capacity is not None  # the config refuses dropless experts-choose
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


def _cast(probs: Float[Array, "G S E"], config: SwitchConfig, dtype: DTypeLike) -> Float[Array, "G S E"]:
    return probs.astype(dtype).astype(jnp.float32) if config.cast_router_probs else probs


def _both(a: Bool[Array, "G S"] | None, b: Bool[Array, "G S"] | None) -> Bool[Array, "G S"] | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def report(routed: Routed, grouping: Grouping, *, with_logits: bool = False, total: routing.Total = lambda x: x) -> RouterOutput:
    """Losses, metrics and the choices of each token, by batch and length again.

    total: inside an SPMD body, adds up over its devices; for the metrics only.
    """
    plan, counted = routed.plan, routed.counted
    # Means are over all places of a group but its filling: ignored padding stays in the denominators, as in flaxformer.
    share = 1.0 / plan.expert.shape[1] if counted is None else 1.0 / counted.sum(1, keepdims=True)
    probs = routed.probs if counted is None else jnp.where(counted[..., None], routed.probs, 0.0)
    balance = routing.load_balancing_loss(routed.chose.sum(1) * share, probs.sum(1) * share)
    metrics = routing.routing_metrics(plan, routed.probs, routed.real, total)
    overflowed = jnp.zeros((), jnp.float32) if routed.overflowed is None else total(routed.overflowed.sum())
    return RouterOutput(
        load_balancing_loss=balance if plan.tokens_choose else jnp.zeros((), jnp.float32),
        z_loss=routing.router_z_loss(routed.logits, counted),
        metrics={**metrics, "choices_overflowed": overflowed},
        expert_index=grouping.ungroup(plan.expert),
        kept=grouping.ungroup(plan.kept),
        expert_fraction=grouping.ungroup(routed.chose).mean(1),
        mean_probs=grouping.ungroup(routed.probs).mean(1),
        logits=grouping.ungroup(routed.logits) if with_logits else None,
    )
