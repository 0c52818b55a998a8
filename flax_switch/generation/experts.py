"""Sparse layers in decoding: a step has few tokens, so only the experts that they hit are read.

A processor must not copy an expert's kernels to read them, and a slice of the stack at an index found while running is a copy.
There experts are arrays of their own, and a `lax.switch` jumps to the one that is hit. On an accelerator a gather of the kernels
that are hit is quick, and branches are not. Sharded experts run as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.config import SwitchConfig
from flax_switch.nn.moe import SparseMLP
from flax_switch.ops import routing
from flax_switch.ops.experts import mlp
from flax_switch.ops.moe import route

Kernels = Mapping[str, Array]


def split_experts(params: Mapping[str, Any], config: SwitchConfig) -> tuple[tuple[Kernels, ...], ...] | None:
    """The kernels of every decoder expert as arrays of their own, by sparse layer and expert; None where that does not help.

    The arrays share the memory of the stacked ones: on one processor a part of an array is one without a copy.
    """
    if not config.sparse_indices("decoder"):
        return None
    stacks = [params["decoder"][f"layers_{i}"]["mlp"]["expert"] for i in config.sparse_indices("decoder")]
    if not all(_on_one_processor(leaf) for leaf in jax.tree.leaves(stacks)):
        return None

    def split(stack):
        kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in stack.items()}
        return tuple(
            {name: jax.device_put(kernel[e], may_alias=True) for name, kernel in kernels.items()} for e in range(config.num_experts)
        )

    return tuple(split(stack) for stack in stacks)


def _on_one_processor(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu")


def sparse_mlp(
    params: Mapping[str, Any], experts: Sequence[Kernels] | None, x: Float[Array, "R D"], config: SwitchConfig, *, sharded: bool
) -> Float[Array, "R D"]:
    """A sparse MLP on one new token of each row, equal to `SparseMLP` on x[:, None].

    Args:
      params: of the layer's `SparseMLP`.
      experts: its experts one by one, from `split_experts`, or None.
      config: with the routing that generation uses.
      sharded: the parameters lie on several devices.
    """
    num_choices = x.shape[0] * config.num_selected_experts
    few = experts is not None or num_choices < config.num_experts
    if sharded or not few or config.routing_group != "sequence":
        return SparseMLP(config, "decoder").apply({"params": params}, x[:, None], padding_mask=None, deterministic=True)[0][:, 0]
    # A sequence's only token meets no competition for its experts' slots, whatever the capacity.
    config = config.replace(capacity_mode="dropless", router_type="tokens_choose")
    router = params["router"]["router_weights"]["w"]
    logits = routing.router_logits(x[:, None], router["kernel"], router.get("bias"), dtype=config.router_dtype)
    plan = route(logits, config=config, stack="decoder", dtype=x.dtype).plan
    expert, weight = plan.expert[:, 0], plan.weight[:, 0]
    dtype = jnp.dtype(config.expert_dtype or config.dtype)
    tokens = x.astype(dtype)
    if experts is None:
        stacked = {name: leaf["kernel"] for name, leaf in params["expert"].items()}
        answers = _gathered(stacked, tokens, expert, config)
    else:
        answers = _switched(experts, tokens, expert, config)
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

    Choices are sorted by expert and cut into blocks of one expert each; the last block of an expert may be padded.
    """
    R, N = expert.shape
    branches = [lambda rows, kernels=kernels: mlp(rows, kernels, config.mlp_activations, jnp.matmul) for kernels in experts]
    if R * N == 1:
        return jax.lax.switch(expert[0, 0], branches, x)[:, None]
    # Up to a few rows, products of one row each stream the kernels faster than one product of all.
    size = 1 if R * N <= SINGLE_ROWS else BLOCK
    flat = expert.reshape(-1)
    order = jnp.argsort(flat)
    lengths = (flat[:, None] == jnp.arange(len(experts))).sum(0)
    starts = jnp.cumsum(lengths) - lengths
    blocks_until = jnp.cumsum(-(-lengths // size))

    def run(block, answers):
        e = (blocks_until <= block).sum()
        first = starts[e] + size * (block - (blocks_until[e] - -(-lengths[e] // size)))
        places = first + jnp.arange(size)
        choices = jnp.where(places < starts[e] + lengths[e], order[jnp.minimum(places, R * N - 1)], R * N)
        rows = x[jnp.minimum(choices, R * N - 1) // N]
        return answers.at[choices].set(jax.lax.switch(e, branches, rows), mode="drop")

    answers = jnp.zeros((R * N, x.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, blocks_until[-1], run, answers).reshape(R, N, -1)


SINGLE_ROWS = 8
BLOCK = 8
