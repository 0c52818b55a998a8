"""Experts that lie in files: a program calls out for one when it comes to its rows.

The arithmetic is that of the executors for experts in memory: the rows of an expert are multiplied in products of the same shapes,
so that every bit is the same. What differs is the order: experts are the outer loop, so that each is read once for all its rows.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flax_switch.config.weights import BIAS
from flax_switch.ops.kernels.few_rows import MLP, Kernels, SortedChoices, alone, as_kernels
from flax_switch.ops.kernels.grouped_blocks import row_blocks, zeros
from flax_switch.ops.kernels.narrow import for_few
from flax_switch.ops.kernels.on_disk import OnDisk, fetch_arrays
from flax_switch.ops.kernels.quantized import multiply


def fetch(experts: OnDisk, expert: Int[Array, ""], rows: Int[Array, " E"]) -> Kernels:
    """Returns the kernels of an expert. rows: how many hit each; those that are hit have to be fetched in order."""
    kernels: dict[str, dict[str, Array]] = {}
    for name, array in fetch_arrays(experts, expert, rows).items():
        kernel, _, part = name.partition("/")
        kernels.setdefault(kernel, {})[part] = array
    biases = lambda name: name.endswith(BIAS)  # noqa: E731
    return {name: kernel if biases(name) else for_few(kernel, experts.few) for name, kernel in as_kernels(kernels).items()}


def _each_hit(
    experts: OnDisk, rows: Int[Array, " E"], step: Callable[[Int[Array, ""], Kernels, Array], Array], out: Array
) -> Array:
    """Calls `step` with every expert that is hit, its kernels and what the one before returned, and returns what the last does."""
    order = jnp.argsort(rows == 0, stable=True).astype(jnp.int32)

    def body(i: Int[Array, ""], out: Array) -> Array:
        return step(order[i], fetch(experts, order[i], rows), out)

    return lax.fori_loop(0, (rows > 0).sum(), body, out)


def sorted_rows(x: Float[Array, "R D"], group_sizes: Int[Array, " E"], experts: OnDisk, mlp: MLP) -> Float[Array, "R D"]:
    """Returns the experts' outputs for sorted rows, in the blocks of `grouped_blocks.block_rows`."""
    num_rows = x.shape[0]
    every = tuple(row_blocks(group_sizes, num_rows, cut=True))

    def step(expert: Int[Array, ""], kernels: Kernels, out: Array) -> Array:
        for blocks in every:

            def one(index: Int[Array, ""], out: Array, blocks=blocks) -> Array:
                _, first, own = blocks.block(index, num_rows)
                rows = lax.dynamic_slice_in_dim(x, first, blocks.size)
                product = mlp(rows, kernels, matmul=multiply)
                others = lax.dynamic_slice_in_dim(out, first, blocks.size)
                return lax.dynamic_update_slice_in_dim(out, jnp.where(own, product, others), first, 0)

            last = blocks.last_block[expert]
            before = jnp.where(expert > 0, blocks.last_block[expert - 1], 0)
            out = lax.fori_loop(before, last, one, out)
        return out

    return _each_hit(experts, group_sizes, step, zeros(x.shape, x.dtype, group_sizes))


def buffers(x: Float[Array, "G E C D"], rows: Int[Array, " E"], experts: OnDisk, mlp: MLP) -> Float[Array, "G E C D"]:
    """Returns the experts' outputs for buffers of equal size; zeros for an expert that no row is for."""

    def step(expert: Int[Array, ""], kernels: Kernels, out: Array) -> Array:
        buffer = lax.dynamic_index_in_dim(x, expert, 1, keepdims=False)  # [G, C, D]
        made = mlp(buffer.reshape(-1, x.shape[-1]), kernels, matmul=multiply).reshape(buffer.shape)
        return lax.dynamic_update_index_in_dim(out, made, expert, 1)

    return _each_hit(experts, rows, step, jnp.zeros_like(x))


def few_rows(x: Float[Array, "R D"], expert: Int[Array, "R N"], experts: OnDisk, mlp: MLP) -> Float[Array, "R N D"]:
    """Returns the outputs of every row's N experts, in the blocks of `few_rows`'s implementation "switch"."""
    choices = SortedChoices.of(expert, experts.shape[0])
    if choices.size == 1:
        kernels = fetch(experts, expert[0, 0], choices.lengths)
        return mlp(x, kernels, matmul=multiply)[:, None]

    def step(e: Int[Array, ""], kernels: Kernels, outputs: Array) -> Array:
        def block(b: Int[Array, ""], outputs: Array) -> Array:
            places, rows, single = choices.block(x, e, b)
            run = lambda rows: mlp(rows, kernels, matmul=multiply)  # noqa: E731
            return outputs.at[places].set(lax.cond(single, alone(run), run, rows), mode="drop")

        return lax.fori_loop(0, choices.blocks[e], block, outputs)

    outputs = jnp.zeros((expert.size, x.shape[-1]), x.dtype)
    return _each_hit(experts, choices.lengths, step, outputs).reshape(*expert.shape, -1)
