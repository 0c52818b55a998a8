"""Experts on several devices: tokens travel to their experts and back; the experts' weights stay where they are.

One SPMD body, the same under `jax.shard_map` and `jax.pmap`. A device routes its own groups and talks to its peers only here:

    capacity    buffers [G, E, C, D] go out by one all-to-all, and the expert outputs come back by another
    dropless    rows sorted by expert go out and come back by ragged all-to-alls, after each device has told how many it has; in
                further rounds of the same where a device is sent more than it has room for

Gradients take the same ways backwards. What was received is named, so that remat policies keep it and nothing is sent again.
`over_mesh` and `pmap_peers` lay the body over a mesh or a pmap: which part of what each device sees.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flax_switch.config import check
from flax_switch.config.weights import BIAS, stored
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.exchange import Peers, Shipment, locate, send_rows, starts
from flax_switch.ops.kernels.floats import floats_of
from flax_switch.ops.kernels.quantized import Kernel, Quantized
from flax_switch.ops.moe.executors import ExpertFunction, SortedView, sorted_view
from flax_switch.ops.moe.groups import Grouping
from flax_switch.ops.moe.routing import RoutingPlan
from flax_switch.ops.moe.rows import take_rows
from flax_switch.parallel.gathering import gathered
from flax_switch.parallel.mesh import BATCH_AXES, AnyMesh, partition_spec
from flax_switch.parallel.placement import OnMesh, UnderPmap

log = logging.getLogger(__name__)

# Names of the activations that came from other devices.
EXCHANGED = ("tokens_at_their_experts", "outputs_at_their_tokens")

# What rounds beyond the first are called in a program's text: loops that most steps do not enter.
FURTHER_ROUNDS = "further_rounds"

# A round, sorted rows, their group sizes, and the arrays that are needed, to outputs.
PeersExperts = Callable[[Any, Float[Array, "R D"], Int[Array, " E"], Any], Float[Array, "R D_out"]]

_LAST_BIAS = f"wo{BIAS}"

_STRADDLE = (
    "a batch of %d x %d in routing groups of %d tokens, cut into %d parts, would cut through groups. Make the tokens of a part a "
    "multiple of model.group_size, or use model.routing_group='sequence'"
)


def exchange_buffers(experts: ExpertFunction, peers: Peers) -> ExpertFunction:
    """Makes a function of buffers for all experts from `experts`, which has this device's share of them."""

    def run(buffers: Float[Array, "G E C D"]) -> Float[Array, "G E C D_out"]:
        received = peers.all_to_all(buffers, 1, 0)  # [ways * G, E / ways, C, D]
        outputs = experts(checkpoint_name(received, EXCHANGED[0]))
        return checkpoint_name(peers.all_to_all(outputs, 0, 1), EXCHANGED[1])

    return run


def room_of(num_choices: int, ways: int, buffer_factor: float) -> int:
    """Returns how many rows a device serves at a time: `buffer_factor` times its even share, and never more than there can be."""
    return min(ways * num_choices, 8 * math.ceil(buffer_factor * num_choices / 8))


def execute_dropless(
    plan: RoutingPlan, x: Float[Array, "G S D"], experts: PeersExperts, arrays: Any, peers: Peers, *, buffer_factor: float
) -> tuple[Float[Array, "G S D_out"], Int[Array, ""]]:
    """Executes a dropless plan of tokens that choose; `experts` is for this device's share of them, and `arrays` what it needs.

    A device has room for `buffer_factor` times its even share of rows. Where one is sent more, all devices go further rounds, each
    of as many rows, until every row is served. Returns the outputs, and how many of this device's choices waited for such a round.
    """
    view = sorted_view(plan)
    room = room_of(math.prod(plan.expert.shape), peers.ways, buffer_factor)
    wanted = peers.all_gather(view.group_sizes)  # [P, E]
    outputs = checkpoint_name(_served(experts, room, peers, x, arrays, view, wanted), EXCHANGED[1])
    sent = lax.dynamic_index_in_dim(in_round(0, wanted, room)[1], peers.index(), 0, keepdims=False)
    return view.combined(plan, outputs).astype(x.dtype), view.group_sizes.sum() - sent.sum(dtype=jnp.int32)


def in_round(number: Int[Array, ""] | int, wanted: Int[Array, "P E"], room: int) -> tuple[Shipment, Int[Array, "P P E_own"]]:
    """Returns what is sent in a round, and how many rows [sender, receiver, experts of the receiver] that is.

    A receiver takes senders in order, and of each its experts in order: in round i the rows from i * room on.
    """
    ways = wanted.shape[0]
    rows = wanted.reshape(ways, ways, -1)
    begin = starts(rows.swapaxes(0, 1).reshape(ways, -1)).reshape(ways, ways, -1).swapaxes(0, 1)
    before = jnp.clip(number * room - begin, 0, rows)  # served in earlier rounds
    counts = jnp.clip((number + 1) * room - begin, 0, rows) - before
    between = counts.sum(-1, dtype=jnp.int32)
    taken = starts(rows.sum(-1, dtype=jnp.int32)) + before.sum(-1, dtype=jnp.int32)
    return Shipment(between, taken, starts(between, axis=0)), counts


def _num_rounds(wanted: Int[Array, "P E"], room: int, peers: Peers) -> Int[Array, ""]:
    """Returns how many rounds serve all rows, the same on all devices: in each they talk to one another."""
    sent = wanted.reshape(peers.ways, peers.ways, -1).sum((0, 2), dtype=jnp.int32)
    return peers.largest((sent.max() + room - 1) // room)


def _serve(
    number: Any, experts: PeersExperts, room: int, peers: Peers, x: Array, arrays: Any, view: SortedView, wanted: Array
) -> Array:
    """Returns the outputs of a device's rows that are served in a round, and zeros for the others."""
    shipment, counts = in_round(number, wanted, room)
    local = lax.dynamic_index_in_dim(counts, peers.index(), 1, keepdims=False)
    rows = view.rows(x)
    received = checkpoint_name(send_rows(rows, shipment, room, peers), EXCHANGED[0])
    order, inverse = by_expert(local, room)
    sorted_rows = take_rows(received[None], order[None], inverse[None, :, None])[0]
    outputs = experts(number, sorted_rows, local.sum(0, dtype=jnp.int32), arrays)
    outputs = take_rows(outputs[None], inverse[None], order[None, :, None])[0]
    return send_rows(outputs, shipment.back(), rows.shape[0], peers)


def _further_rounds(first: Any, one: Callable[[Any], Any], room: int, peers: Peers, wanted: Array, num_rows: int) -> Any:
    """Returns what the first round gave, with what `one` gives for each further round added; in most steps there is none."""
    if room >= peers.ways * num_rows:
        return first
    with jax.named_scope(FURTHER_ROUNDS):
        add = lambda number, total: jax.tree.map(jnp.add, total, one(number))  # noqa: E731
        return lax.fori_loop(1, _num_rounds(wanted, room, peers), add, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _served(experts: PeersExperts, room: int, peers: Peers, x: Array, arrays: Any, view: SortedView, wanted: Array) -> Array:
    """Returns the outputs of a device's rows, in as many rounds as it takes.

    Its gradient is written out, as the number of rounds is not known when it is traced: a further round keeps nothing, and is gone
    through again.
    """
    one = lambda number: _serve(number, experts, room, peers, x, arrays, view, wanted)  # noqa: E731
    return _further_rounds(one(0), one, room, peers, wanted, view.choice.shape[1])


def _served_forward(experts, room, peers, x, arrays, view, wanted):
    floats, with_floats, _ = floats_of(arrays)
    serve = lambda number, x, floats: _serve(number, experts, room, peers, x, with_floats(floats), view, wanted)  # noqa: E731
    first, pull = jax.vjp(functools.partial(serve, 0), x, floats)
    outputs = _further_rounds(first, lambda number: serve(number, x, floats), room, peers, wanted, view.choice.shape[1])
    return outputs, (pull, x, arrays, view, wanted)


def _served_backward(experts, room, peers, residuals, gradient):
    pull, x, arrays, view, wanted = residuals
    floats, with_floats, gradient_of = floats_of(arrays)

    def one(number):
        serve = lambda x, floats: _serve(number, experts, room, peers, x, with_floats(floats), view, wanted)  # noqa: E731
        return jax.vjp(serve, x, floats)[1](gradient)

    of_x, of_floats = _further_rounds(pull(gradient), one, room, peers, wanted, view.choice.shape[1])
    return of_x, gradient_of(of_floats), None, None


_served.defvjp(_served_forward, _served_backward)


def by_expert(counts: Int[Array, "P E"], num_rows: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """Returns the order that sorts rows lying by sender, then expert, by expert, then sender; and its inverse.

    counts: rows from each sender to each expert of this device. Rows behind the last are `num_rows` in both.
    """

    def reorder(counts: Int[Array, "a b"]) -> Int[Array, " R"]:
        """Returns for each row in the order of b, then a, its place in the order of a, then b."""
        other = jnp.append(starts(counts.reshape(-1)).reshape(counts.shape).T.reshape(-1), 0)
        part, place = locate(counts.T.reshape(-1), num_rows)
        return jnp.where(part < counts.size, other[part] + place, num_rows)

    return reorder(counts), reorder(counts.T)


def fits_mesh(grouping: Grouping, mesh: AnyMesh) -> bool:
    """Returns whether every device of a mesh has whole groups.

    Otherwise the body runs as one program that GSPMD splits: the same results, with more communication. That is right for single
    sequences, as in initialisation and generation; for a batch the log says so once.
    """
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
    fits = grouping.splits(ways)
    if not fits and grouping.batch % ways == 0:
        _warn(_STRADDLE % (grouping.batch, grouping.length, grouping.group_size, ways))
    return fits


@functools.cache
def _warn(message: str) -> None:
    log.warning("Experts are not exchanged expert-parallel: %s.", message)


def over_mesh(
    body: Callable[..., tuple[Array, Any]], arrays: tuple, devices: OnMesh, grouping: Grouping, *, dtype: DTypeLike
) -> tuple[Array, Any]:
    """Runs `ops.moe.block.route_and_execute` on every device of a mesh.

    The batch is cut over ('expert', 'data'), experts over 'expert', their F over 'model'. arrays: its global arguments (params, x,
    mask, token_ids, jitter_rng, dropout_rng). The result is global too. Generators are made each device's own, so draws differ
    from one mesh to another. Devices along 'model' hold slices of each expert and the same tokens; their outputs, combined, are
    added up at the end: that moves the fewest bytes, a token's D once however many slots it takes.
    """
    (params, *others), mesh = arrays, devices.mesh
    # Cast before they are handed over: what fsdp gathers inside, and what gradients add up over data, is in the experts' dtype.
    params = dataclasses.replace(params, expert={name: kernel.astype(dtype) for name, kernel in params.expert.items()})
    kernels = {name: _kernel_specs(name, kernel, devices) for name, kernel in params.expert.items()}
    sliced = "wo" in kernels and "model" in jax.tree.leaves(kernels["wo"])[0]
    # int4 may have too few groups of inputs to be cut; then nothing of an expert is, nor of one that only projects
    if not sliced:
        kernels = jax.tree.map(lambda spec: PartitionSpec(*(axis if axis != "model" else None for axis in spec)), kernels)
    batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    peers = Peers("expert", mesh.shape["expert"], others="data" if mesh.shape["data"] > 1 else None)
    own = grouping.part(math.prod(mesh.shape[a] for a in BATCH_AXES))

    def on_device(params, x, mask, token_ids, jitter_rng, dropout_rng):
        rank = lax.axis_index(BATCH_AXES)
        if sliced and _LAST_BIAS in params.expert:  # what the slices of an expert add up to has it once
            once = jnp.where(lax.axis_index("model") == 0, params.expert[_LAST_BIAS], 0)
            params = dataclasses.replace(params, expert={**params.expert, _LAST_BIAS: once})
        params = dataclasses.replace(params, expert=jax.tree.map(gathered, params.expert, kernels))
        fold = lambda rng, index: None if rng is None else jax.random.fold_in(rng, index)  # noqa: E731
        jitter_rng, dropout_rng = fold(jitter_rng, rank), fold(fold(dropout_rng, rank), lax.axis_index("model"))
        y, routed = body(params, x, mask, token_ids, jitter_rng, dropout_rng, grouping=own, peers=peers)
        return y[None], routed

    # check_vma would ask every loop and custom gradient below to state over which axes it varies. Without it a psum's transpose
    # is a psum: there is none in the body.
    y, routed = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(
            dataclasses.replace(params, router_kernel=whole, router_bias=whole, expert=kernels),
            batch,
            batch,
            batch,
            whole,
            whole,
        ),
        out_specs=(PartitionSpec("model" if sliced else None, *batch), batch),
        check_vma=False,
    )(params, *others)
    return lax.reduce_sum(y, (0,)), routed  # jnp.sum would send bfloat16 as float32


def _kernel_specs(name: str, kernel: Kernel, devices: OnMesh) -> Any:
    """Returns how each array of the experts' kernels of a name is cut."""
    mesh, fsdp = devices.mesh, devices.fsdp
    inputs, outputs = ("mlp", "embed") if name.startswith("wo") else ("embed", "mlp")
    axes = ("expert", None if name.endswith(BIAS) else inputs, outputs)
    if isinstance(kernel, Adapted):
        expert, inputs, outputs = axes
        parts = ((kernel.a, (expert, inputs, None)), (kernel.b, (expert, None, outputs)), (kernel.gain, (expert, None, outputs)))
        specs = [partition_spec(axes, part.shape, mesh) for part, axes in parts if part is not None]
        base = _kernel_specs(name, kernel.base, dataclasses.replace(devices, fsdp=False))
        return jax.tree.unflatten(jax.tree.structure(kernel), [*jax.tree.leaves(base), *specs])
    held = stored(kernel.shape, kernel.weights, axes).axes if isinstance(kernel, Quantized) else axes
    return jax.tree.map(lambda array: partition_spec(held, array.shape, mesh, fsdp=fsdp), kernel)


def own_groups(grouping: Grouping, ways: int) -> Grouping:
    """Returns a device's part of the groups of all devices' batches; raises `ConfigError` where one lies on several of them."""
    check(
        grouping.splits(ways),
        "With mesh.mode='pmap' " + _STRADDLE % (grouping.batch, grouping.length, grouping.group_size, ways) + ".",
    )
    return grouping.part(ways)


def pmap_peers(devices: UnderPmap) -> Peers:
    """Returns the devices of a pmap among which experts are split."""
    return Peers(devices.axis, devices.expert, devices.expert_groups, devices.axis if devices.data > 1 else None)
