"""A sparse MLP as one pure function: group, route, execute, and report."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_switch.config import SwitchConfig
from flax_switch.ops.kernels.choice import Choice, choose, of_buffers, run_chosen
from flax_switch.ops.kernels.exchange import Peers
from flax_switch.ops.kernels.few_rows import few_rows
from flax_switch.ops.kernels.grouped import batched_matmul, grouped_matmul
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.on_disk import OnDisk, check_in_memory
from flax_switch.ops.kernels.quantized import Kernel, multiply
from flax_switch.ops.mlp import expert_dtype, expert_function
from flax_switch.ops.moe import fetched
from flax_switch.ops.moe.executors import ExpertFunction, SortedExperts, execute_buffers, execute_hit, execute_ragged
from flax_switch.ops.moe.expert_parallel import exchange_buffers, execute_dropless, fits_mesh, over_mesh, own_groups, pmap_peers
from flax_switch.ops.moe.groups import Grouping, make_grouping
from flax_switch.ops.moe.hashing import hash_logits
from flax_switch.ops.moe.routing import Routed, RouterOutput, RoutingPlan, masked, report, route, router_logits
from flax_switch.parallel.placement import ONE_DEVICE, LaidOutByCompiler, OnMesh, Placement, UnderPmap


@flax.struct.dataclass
class MoEParams:
    """The arrays of one sparse MLP."""

    router_kernel: Float[Array, "D E"] | Narrow | None  # None, as the bias, where the router learns nothing
    router_bias: Float[Array, " E"] | None
    expert: Mapping[str, Kernel] | OnDisk  # see `ops.mlp.ExpertKernels`
    shared_expert: Mapping[str, Kernel] | None = None  # the same without E
    unstacked: tuple[Mapping[str, Kernel], ...] | OnDisk | None = None  # `expert` once more, each an array of its own


def moe_block(
    params: MoEParams,
    x: Float[Array, "B L D"],
    *,
    config: SwitchConfig,
    padding_mask: Bool[Array, "B L"] | None,
    deterministic: bool,
    token_ids: Int[Array, "B L"] | None = None,
    jitter_rng: PRNGKeyArray | None = None,
    dropout_rng: PRNGKeyArray | None = None,
    causal: bool = False,
    replicas: int = 1,
    with_logits: bool = False,
    devices: Placement = ONE_DEVICE,
) -> tuple[Float[Array, "B L D_out"], RouterOutput]:
    """Routes each token to its experts and returns the weighted expert outputs, zero for tokens that no expert took.

    padding_mask: True for real tokens; used only where `config.ignore_padding_tokens`. deterministic: evaluation's capacity, no
    jitter, no dropout. token_ids: needed by hash routing only. The generators are needed only where the config's rates are not 0.
    causal: see `ops.moe.routing.route`. replicas: see `ops.moe.groups`. devices: over a mesh or under pmap groups are routed where
    they lie, and tokens sent to the devices of their experts (`ops.moe.expert_parallel`). Under pmap x and the experts' kernels
    are a device's own, losses are those of its own groups, and metrics those of all devices.
    """
    if deterministic:
        jitter_rng = dropout_rng = None
    else:
        check_in_memory(params, "Training")
    if type(devices) is not Placement:
        check_in_memory(params, "A mesh of several devices")
    grouping = make_grouping(config, x.shape[0] * devices.size, x.shape[1], replicas=replicas)
    mask = padding_mask if config.ignore_padding_tokens else None
    arrays = (dataclasses.replace(params, shared_expert=None), x, mask, token_ids, jitter_rng, dropout_rng)
    body = functools.partial(route_and_execute, config=config, causal=causal, deterministic=deterministic)
    if isinstance(devices, UnderPmap):
        grouping = own_groups(grouping, devices.size)
        y, routed = body(*arrays, grouping=grouping, peers=pmap_peers(devices))
    elif isinstance(devices, OnMesh) and fits_mesh(grouping, devices.mesh):
        y, routed = over_mesh(body, arrays, devices, grouping, dtype=expert_dtype(config))
    else:
        split, parted = isinstance(devices, LaidOutByCompiler), isinstance(devices, OnMesh)
        y, routed = body(*arrays, grouping=grouping, split=split, parted=parted)
    if params.shared_expert is not None:
        experts = expert_function(config, None if dropout_rng is None else jax.random.fold_in(dropout_rng, 1))
        y = y + experts(x.astype(expert_dtype(config)), params.shared_expert, matmul=multiply).astype(x.dtype)
    return y, report(routed, grouping, with_logits=with_logits, total=devices.sum)


def route_and_execute(
    params: MoEParams,
    x: Float[Array, "B L D"],
    mask: Bool[Array, "B L"] | None,
    token_ids: Int[Array, "B L"] | None,
    jitter_rng: PRNGKeyArray | None,
    dropout_rng: PRNGKeyArray | None,
    *,
    config: SwitchConfig,
    causal: bool,
    deterministic: bool,
    grouping: Grouping,
    peers: Peers | None = None,
    split: bool = False,
    parted: bool = False,
) -> tuple[Float[Array, "B L D_out"], Routed]:
    """Runs the SPMD body: what one device does with its tokens, alone or with the `peers` among which experts are split.

    split: that they are split although there are no peers to talk to. parted: that the compiler parts the program and its gradients
    for several devices. It cannot part those of the kernels for TPUs.
    """
    tokens = grouping.group(x)
    ids = None if token_ids is None else grouping.group(token_ids)
    routed = route(
        ROUTERS[config.router_type](params, tokens, ids, config, jitter_rng),
        config=config,
        causal=causal,
        counted=grouping.counted(),
        mask=None if mask is None else grouping.group(mask),
        deterministic=deterministic,
        dtype=x.dtype,
    )
    plan = routed.plan
    if peers is not None and peers.ways == 1:
        peers = None
    executor = choose(
        config.moe_executor,
        groups=plan.expert.shape,
        capacity=plan.capacity,
        num_experts=config.num_experts,
        unstacked=params.unstacked is not None,
        split=split or peers is not None,
    )
    if parted:
        executor = Choice(*("blocks" if name == "ragged" else name for name in executor))
    names = () if isinstance(params.expert, OnDisk) else params.expert
    tokens, experts = tokens.astype(expert_dtype(config)), expert_function(config, dropout_rng, names)
    plan = masked(
        plan,
        config.expert_masking_rate,
        None if jitter_rng is None else jax.random.fold_in(jitter_rng, 1),
        deterministic=deterministic,
    )
    if peers is None or isinstance(params.expert, OnDisk):
        run = functools.partial(execute, plan, kernels=params.expert, experts=experts, unstacked=params.unstacked)
        y = run_chosen(executor, lambda name: functools.partial(run, executor=name), tokens)
    elif plan.capacity is None and executor.elsewhere in SORTED:
        run, factor = functools.partial(_in_a_round, config, SORTED[executor.elsewhere]), config.expert_parallel_buffer_factor
        y, waited = execute_dropless(plan, tokens, run, (params.expert, dropout_rng), peers, buffer_factor=factor)
        first = jnp.arange(plan.expert.shape[0]) == 0
        routed = dataclasses.replace(routed, overflowed=jnp.where(first, waited, 0).astype(jnp.float32))
    else:  # whatever has a capacity travels in buffers
        run = exchange_buffers(buffered_experts(experts, params.expert), peers)
        y = execute_buffers(plan, tokens, run, executor=of_buffers(executor))
    return grouping.ungroup(y).astype(x.dtype), routed


def _in_a_round(config: SwitchConfig, implementation: str | None, number, rows, sizes, arrays) -> Float[Array, "R D_out"]:
    """Runs the experts of a device on the rows of a round, with dropout of the round's own."""
    kernels, rng = arrays
    rng = None if rng is None else jax.random.fold_in(rng, number)
    return grouped_experts(expert_function(config, rng, kernels), kernels, implementation)(rows, sizes)


def _learned(
    params: MoEParams, tokens: Float[Array, "G S D"], token_ids, config: SwitchConfig, jitter_rng: PRNGKeyArray | None
) -> Float[Array, "G S E"]:
    assert params.router_kernel is not None
    return router_logits(
        tokens,
        params.router_kernel,
        params.router_bias,
        dtype=config.router_dtype,
        jitter=config.router_jitter_noise,
        jitter_rng=jitter_rng,
    )


def _hashed(params, tokens, token_ids: Int[Array, "G S"], config: SwitchConfig, jitter_rng) -> Float[Array, "G S E"]:
    return hash_logits(token_ids, vocab_size=config.vocab_size, num_experts=config.num_experts, seed=config.hash_seed)


# How each `router_type` scores all experts for every token; `ops.moe.routing.route` makes a plan of the logits.
ROUTERS = {"tokens_choose": _learned, "experts_choose": _learned, "hash": _hashed}


def execute(
    plan: RoutingPlan,
    x: Float[Array, "G S D"],
    kernels: Mapping[str, Kernel] | OnDisk,
    experts,
    *,
    executor: str,
    unstacked: Sequence[Mapping[str, Kernel]] | OnDisk | None = None,
) -> Float[Array, "G S D_out"]:
    """Runs the plan with one of the executors; `experts` is what `ops.mlp.expert_function` returns."""
    if isinstance(kernels, OnDisk):
        return _execute_on_disk(plan, x, kernels, experts, executor)
    assert not isinstance(unstacked, OnDisk)  # both are, or neither is
    if executor in SORTED:
        return execute_ragged(plan, x, grouped_experts(experts, kernels, SORTED[executor]))
    if executor == "hit":
        return execute_hit(plan, x, functools.partial(few_rows, mlp=experts, stacked=kernels, unstacked=unstacked))
    return execute_buffers(plan, x, buffered_experts(experts, kernels), executor=executor)


def _execute_on_disk(plan: RoutingPlan, x: Float[Array, "G S D"], on_disk: OnDisk, experts, executor: str) -> Float[Array, "G S D"]:
    if executor in SORTED:
        return execute_ragged(plan, x, lambda rows, sizes: fetched.sorted_rows(rows, sizes, on_disk, experts))
    if executor == "hit":
        return execute_hit(plan, x, lambda rows, expert: fetched.few_rows(rows, expert, on_disk, experts))
    chosen = jax.nn.one_hot(plan.expert, plan.num_experts, dtype=bool) & plan.kept[..., None]
    rows = chosen.sum((0, 1, 2), dtype=jnp.int32)
    return execute_buffers(plan, x, lambda buffers: fetched.buffers(buffers, rows, on_disk, experts), executor=executor)


# Executors of sorted rows, and the implementation of their grouped GEMM; None: the platform's.
SORTED = {"ragged": None, "blocks": "blocks"}


def grouped_experts(experts, kernels: Mapping[str, Kernel], implementation: str | None) -> SortedExperts:
    """Returns `experts` as a function of sorted rows and their group sizes."""
    matmul = functools.partial(grouped_matmul, implementation=implementation)
    return lambda rows, sizes: experts(rows, kernels, matmul=functools.partial(matmul, group_sizes=sizes))


def buffered_experts(experts, kernels: Mapping[str, Kernel]) -> ExpertFunction:
    """Returns `experts` as a function of buffers of equal size."""
    return functools.partial(experts, kernels=kernels, matmul=batched_matmul)
