"""Checkpoints with another number of experts: fewer, kept or merged by how they were used, or more, which begin as copies.

Fewer (pruning; merging as in 2310.01334): in each layer some experts are kept with their columns of the router, and of merging each
of the others is averaged into the kept one whose scores are most like its own, its hidden units first put in that one's order. With
fewer experts the softmax gives each more; what the layer's output was is restored by a factor in the experts' last kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from flax_switch.config import SwitchConfig, check
from flax_switch.convert.canonical import is_expert, is_router
from flax_switch.convert.checkpoint import Checkpoint, as_floats
from flax_switch.convert.tensors import DTYPES, Index, LazyTensor, from_array, full_index

KEPT_BY = ("usage", "random")
_FEWEST = 1e-9  # of a weight to divide by


@dataclasses.dataclass(frozen=True)
class Groups:
    """What the experts of one layer become: of each new one the experts that it is made of, the kept one first."""

    members: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]  # of each member in the average; their sum is 1
    scales: tuple[float, ...]  # of each new expert's last kernel

    @property
    def kept(self) -> list[int]:
        """The experts whose columns of the router stay."""
        return [group[0] for group in self.members]


def expert_layers(checkpoint: Checkpoint) -> list[str]:
    """Returns where a checkpoint's sparse layers are, in the order of its routers: "encoder/layers_1/mlp", ...

    Raises `ConfigError` for one without any, and for those whose number of experts cannot be changed here.
    """
    config = checkpoint.config
    check(config.is_sparse, f"{checkpoint.path} has no sparse layer, so there are no experts to make fewer or more; see upcycle.")
    check(
        config.layer_form != "fused",
        f"{checkpoint.path} has fused layers, whose experts are parts of attention, too; their number cannot be changed.",
    )
    check(config.learned_router, f"{checkpoint.path} routes tokens by a hash of their ids, which no expert was chosen by.")
    found = (f"{stack.name}/layers_{i}/mlp" for stack in config.stacks for i in stack.sparse_layers)
    return [layer for layer in found if any(path.startswith(f"{layer}/") for path in checkpoint.tensors)]


# --- fewer


def combine_weights(logits: Float[np.ndarray, "M E"], config: SwitchConfig) -> Float[np.ndarray, "M E"]:
    """Returns the weight of each expert's output in each token's, without a capacity; where experts choose, its probability."""
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    if config.router_type == "experts_choose":
        return probs
    order = np.argsort(-probs, axis=-1, kind="stable")[:, : config.num_selected_experts]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights, order, np.take_along_axis(probs, order, -1), -1)
    return weights / weights.sum(-1, keepdims=True) if config.normalize_router_weights else weights


def grouped(
    logits: Float[np.ndarray, "M E"],
    config: SwitchConfig,
    num_experts: int,
    *,
    merge: bool,
    keep: str = "usage",
    rng: np.random.Generator | None = None,
) -> Groups:
    """Returns what becomes of a layer's experts, by its router's logits for M tokens.

    merge: the others are averaged into those that are kept, by usage; else they are left out. keep: "usage" keeps those with the
    largest sum of weights, "random" any, drawn by `rng`, to compare with.
    """
    old = combine_weights(logits, config)
    usage = old.sum(0)
    if keep == "random":
        assert rng is not None
        kept = np.sort(rng.choice(len(usage), num_experts, replace=False))
    else:
        kept = np.sort(np.argsort(-usage, kind="stable")[:num_experts])
    members = [[int(e)] for e in kept]
    if merge:
        scores = logits - logits.mean(-1, keepdims=True)
        scores = scores - scores.mean(0)
        scores /= np.maximum(np.linalg.norm(scores, axis=0), _FEWEST)
        for e in sorted(set(range(len(usage))) - set(kept.tolist())):
            members[int((scores[:, kept].T @ scores[:, e]).argmax())].append(e)
    new = combine_weights(logits[:, kept], config)
    return Groups(
        tuple(map(tuple, members)), tuple(_shares(usage[group]) for group in members), tuple(_scales(old, new, config).tolist())
    )


def _shares(usage: Float[np.ndarray, " members"]) -> tuple[float, ...]:
    total = usage.sum()
    shares = usage / total if total > 0 else np.full(len(usage), 1 / len(usage))
    return tuple(shares.tolist())


def _scales(old: Float[np.ndarray, "M E"], new: Float[np.ndarray, "M K"], config: SwitchConfig) -> Float[np.ndarray, " K"]:
    """Returns for each new expert the mean weight that its tokens gave before over the mean that they give now."""
    if config.router_type == "experts_choose":
        return np.ones(new.shape[1])
    now = new.sum(-1, keepdims=True)
    before = (new * old.sum(-1, keepdims=True) / np.maximum(now, _FEWEST)).sum(0)
    given = new.sum(0)
    return np.where(given > 0, before / np.maximum(given, _FEWEST), 1.0)


def with_fewer(checkpoint: Checkpoint, groups: Mapping[str, Groups]) -> Checkpoint:
    """Returns the checkpoint whose layers' experts are these groups, unread; groups by the names of `expert_layers`."""
    checkpoint = as_floats(checkpoint)
    layers = expert_layers(checkpoint)
    (count,) = {len(group.members) for group in groups.values()}
    tensors = dict(checkpoint.tensors)
    for layer in layers:
        own = {path: tensor for path, tensor in tensors.items() if path.startswith(f"{layer}/")}
        orders = functools.cache(functools.partial(_orders, layer, own, groups[layer]))
        for path, tensor in own.items():
            if is_router(path):
                kept = groups[layer].kept
                tensors[path] = LazyTensor((*tensor.shape[:-1], count), tensor.dtype, _columns(tensor, kept))
            elif is_expert(path):
                tensors[path] = _averaged(path, tensor, groups[layer], orders)
    config = _with_count(checkpoint.config, count)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, huggingface=None)


def _with_count(config: SwitchConfig, count: int) -> SwitchConfig:
    check(
        count >= config.num_selected_experts,
        f"{count} experts are fewer than the {config.num_selected_experts} that a token chooses; keep more.",
    )
    return config.replace(num_experts=count)


def _columns(tensor: LazyTensor, columns: Sequence[int]) -> Callable[[Index], np.ndarray]:
    return lambda index: tensor.numpy()[..., list(columns)][index]


def _one(tensor: LazyTensor, expert: int) -> np.ndarray:
    rows = tensor.read((slice(expert, expert + 1), *full_index(tensor.shape[1:])))
    return rows[0].astype(np.float32)


def _averaged(path: str, tensor: LazyTensor, groups: Groups, orders: Callable[[], Mapping[int, np.ndarray]]) -> LazyTensor:
    """Returns a stack of experts of which each is the average of a group; of last kernels and their biases times its scale."""
    last = "/wo/" in path
    hidden = None if last and path.endswith("/bias") else -2 if last else -1  # the axis of the hidden units

    def read(index: Index) -> np.ndarray:
        rows = []
        for group in range(index[0].start, index[0].stop):
            members, shares = groups.members[group], groups.shares[group]
            total = np.zeros(tensor.shape[1:], np.float32)
            for member, share in zip(members, shares, strict=True):
                kernel = _one(tensor, member)
                if hidden is not None and len(members) > 1 and member != members[0]:
                    kernel = np.take(kernel, orders()[member], axis=hidden)
                total += np.float32(share) * kernel
            total *= np.float32(groups.scales[group]) if last else np.float32(1)
            rows.append(total.astype(tensor.dtype)[index[1:]])
        return np.stack(rows)

    return LazyTensor((len(groups.members), *tensor.shape[1:]), tensor.dtype, read)


def _orders(layer: str, tensors: Mapping[str, LazyTensor], groups: Groups) -> dict[int, Int[np.ndarray, " F"]]:
    """Returns for each expert that is merged into another the order of its hidden units that is most like the other's."""
    from scipy.optimize import linear_sum_assignment  # JAX needs it, too

    kernels = {path: tensor for path, tensor in tensors.items() if is_expert(path) and path.endswith("/kernel")}

    def units(expert: int) -> Float[np.ndarray, "F X"]:
        parts = [_one(tensor, expert) for tensor in kernels.values()]
        return np.concatenate([part if "/wo/" in path else part.T for path, part in zip(kernels, parts, strict=True)], axis=1)

    found = {}
    for members in groups.members:
        first = units(members[0]) if len(members) > 1 else None
        for member in members[1:]:
            assert first is not None
            found[member] = linear_sum_assignment(first @ units(member).T, maximize=True)[1]
    return found


# --- more


def with_more(checkpoint: Checkpoint, num_experts: int, *, router_noise: float = 1e-6, seed: int = 0) -> Checkpoint:
    """Returns the checkpoint with `num_experts` experts, unread: each is there so many times, and computes what it did.

    A token that went to an expert goes to one of its copies. Which one is decided by noise on the router's columns, so small
    (relative to their standard deviation) that probabilities stay as they were; with none the first copy takes all. A copy's
    probability is that of the expert divided by the number of copies, which its last kernel makes up for.
    """
    checkpoint = as_floats(checkpoint)
    config, layers = checkpoint.config, expert_layers(checkpoint)
    times, rest = divmod(num_experts, config.num_experts)
    check(
        times > 1 and rest == 0,
        f"num_experts must be a multiple of the {config.num_experts} experts that there are; it is {num_experts}.",
    )
    check(
        config.router_type == "tokens_choose" and config.num_selected_experts == 1,
        "Growth keeps the function where a token chooses one expert; here "
        + (
            f"it chooses {config.num_selected_experts}, which would be copies of the same one."
            if config.router_type == "tokens_choose"
            else "experts choose tokens."
        ),
    )
    check(0 <= router_noise < 1, f"router_noise must lie in [0, 1); it is {router_noise}.")
    scale = np.float32(1 if config.normalize_router_weights else times)
    tensors = dict(checkpoint.tensors)
    for layer in layers:
        for path in [path for path in tensors if path.startswith(f"{layer}/")]:
            if is_router(path):
                tensors[path] = from_array(_repeated(tensors[path].numpy(), times, router_noise, seed, path))
            elif is_expert(path):
                tensors[path] = _copies(tensors[path], times, scale if "/wo/" in path else np.float32(1))
    return dataclasses.replace(checkpoint, config=config.replace(num_experts=num_experts), tensors=tensors, huggingface=None)


def _repeated(router: np.ndarray, times: int, noise: float, seed: int, path: str) -> np.ndarray:
    """Returns columns [..., E] each `times` times over, side by side, in float32: in 16 bits such noise would be none."""
    columns = np.repeat(router.astype(np.float32), times, axis=-1)
    if noise == 0.0 or path.endswith("/bias"):
        return columns
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return columns + (noise * columns.std() * rng.standard_normal(columns.shape)).astype(DTYPES["float32"])


def _copies(tensor: LazyTensor, times: int, scale: np.float32) -> LazyTensor:
    def read(index: Index) -> np.ndarray:
        rows = [_one(tensor, expert // times) * scale for expert in range(index[0].start, index[0].stop)]
        return np.stack([row.astype(tensor.dtype)[index[1:]] for row in rows])

    return LazyTensor((tensor.shape[0] * times, *tensor.shape[1:]), tensor.dtype, read)
