"""Sparse layers in decoding: a step has few tokens, so only the experts that they hit are read.

A processor must not copy an expert's kernels to read them, and a slice of the stack at an index found while running is a copy.
There experts are arrays of their own, and a `lax.switch` jumps to the one that is hit, once for all rows that hit it. On an
accelerator a gather of those that are hit is quick, and branches are not. Sharded experts run as in training.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.generation.device import Device
from flax_switch.nn.moe import SparseMLP
from flax_switch.ops.mlp import expert_dtype, mlp
from flax_switch.ops.moe import routing
from flax_switch.ops.moe.routing import route

Kernels = Mapping[str, Array]

BLOCK = 16  # choices of the same expert that go together; reading its kernels costs as much as their product


def split_experts(params: Mapping[str, Any], config: SwitchConfig) -> tuple[tuple[Kernels, ...], ...]:
    """The kernels of every decoder expert as arrays of their own, by sparse layer and expert, on one processor.

    They share the memory of the stacked ones, which a part of an array can do there.
    """

    def split(layer):
        stacked = {name: np.asarray(leaf["kernel"]) for name, leaf in layer["mlp"]["expert"].items()}
        return tuple(
            {name: jax.device_put(kernel[e], may_alias=True) for name, kernel in stacked.items()} for e in range(config.num_experts)
        )

    return tuple(split(params["decoder"][f"layers_{i}"]) for i in config.sparse_indices("decoder"))


def cast_experts(experts: tuple[Kernels, ...], config: SwitchConfig) -> tuple[Kernels, ...]:
    """Experts in the dtype of their products."""
    return jax.tree.map(lambda kernel: kernel.astype(expert_dtype(config)), experts)


def sparse_mlp(
    params: Mapping[str, Any],
    experts: Sequence[Kernels] | None,
    x: Float[Array, "R D"],
    config: SwitchConfig,
    device: Device,
) -> Float[Array, "R D"]:
    """A sparse MLP on one new token of each row, equal to `SparseMLP` on x[:, None].

    Args:
      params: of the layer's `SparseMLP`.
      experts: its experts one by one, from `cast_experts`, on a processor.
      config: with the routing that generation uses.
    """
    num_choices = x.shape[0] * config.num_selected_experts
    dense = device is Device.MESH or (device is Device.ACCELERATOR and num_choices >= config.num_experts)
    if dense or config.routing_group != "sequence":
        layer = SparseMLP(config, "decoder")
        return layer.apply({"params": params}, x[:, None], padding_mask=None, deterministic=True)[0][:, 0]
    # A sequence's only token meets no competition for its experts' slots, whatever the capacity.
    config = config.replace(capacity_mode="dropless", router_type="tokens_choose")
    router = params["router"]["router_weights"]["w"]
    logits = routing.router_logits(x[:, None], router["kernel"], router.get("bias"), dtype=config.router_dtype)
    plan = route(logits, config=config, stack="decoder", dtype=x.dtype).plan
    expert, weight = plan.expert[:, 0], plan.weight[:, 0]
    dtype = expert_dtype(config)
    tokens = x.astype(dtype)
    if device is Device.PROCESSOR:
        assert experts is not None
        answers = _switched(experts, tokens, expert, config)
    else:
        answers = _gathered({name: leaf["kernel"] for name, leaf in params["expert"].items()}, tokens, expert, config)
    y = (answers * weight[..., None]).sum(1).astype(dtype).astype(x.dtype)
    if "shared_expert" in params:
        shared = {name: leaf["kernel"] for name, leaf in params["shared_expert"].items()}
        y = y + mlp(tokens, shared, config.mlp_activations, jnp.matmul).astype(x.dtype)
    return y


def _gathered(stacked: Kernels, x: Float[Array, "R D"], expert: Int[Array, "R N"], config: SwitchConfig) -> Float[Array, "R N D"]:
    """Every choice's answer, from copies of the kernels that are hit."""
    hit = {name: kernel[expert] for name, kernel in stacked.items()}
    x = jnp.broadcast_to(x[:, None], (*expert.shape, x.shape[-1]))
    return mlp(x, hit, config.mlp_activations, lambda x, kernel: jnp.einsum("RND,RNDF->RNF", x, kernel))


def _switched(
    experts: Sequence[Kernels], x: Float[Array, "R D"], expert: Int[Array, "R N"], config: SwitchConfig
) -> Float[Array, "R N D"]:
    """Every choice's answer, by jumps to the experts that are hit.

    Choices are sorted by expert and cut into blocks of one expert each. A block of one choice is a product of a vector, which is
    quicker than one of a whole block that is mostly padding.
    """
    R, N = expert.shape
    size = min(R * N, BLOCK)
    run = [functools.partial(mlp, kernels=kernels, activations=config.mlp_activations, matmul=jnp.matmul) for kernels in experts]
    if size == 1:
        return jax.lax.switch(expert[0, 0], run, x)[:, None]
    alone = [lambda rows, answer=answer: jnp.zeros_like(rows).at[:1].set(answer(rows[:1])) for answer in run]
    flat = expert.reshape(-1)
    order = jnp.argsort(flat)
    lengths = jax.nn.one_hot(flat, len(experts), dtype=jnp.int32).sum(0)
    starts = jnp.cumsum(lengths) - lengths
    blocks = -(-lengths // size)
    blocks_until = jnp.cumsum(blocks)

    def step(block, answers):
        e = (blocks_until <= block).sum()
        start = starts[e] + size * (block - blocks_until[e] + blocks[e])
        places = start + jnp.arange(size)
        end = starts[e] + lengths[e]
        choices = jnp.where(places < end, order[jnp.minimum(places, R * N - 1)], R * N)
        rows = x[jnp.minimum(choices, R * N - 1) // N]
        branch = jnp.where(end - start == 1, e + len(experts), e)
        return answers.at[choices].set(jax.lax.switch(branch, run + alone, rows), mode="drop")

    answers = jnp.zeros((R * N, x.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, blocks_until[-1], step, answers).reshape(R, N, -1)
