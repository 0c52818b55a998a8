"""Experts' outputs for a few rows, as in decoding: only the experts that are hit are read.

gather      copies the kernels of each choice; quick on an accelerator
switch      jumps to each expert that is hit, once for all rows that hit it. For a CPU, which must not copy an expert's kernels to
            read them: a slice of the stack at an index found while running is a copy. Experts are arrays of their own here
reference   every row through every expert
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.config import one_of
from flax_switch.config.weights import SCALE
from flax_switch.ops.kernels.quantized import Kernel, Quantized, multiply

Kernels = Mapping[str, Kernel]
MLP = Callable[..., Array]  # `ops.mlp.mlp` with all but rows, kernels and product settled

BLOCK = 16  # choices of the same expert that go together; reading its kernels costs as much as their product


def unstacked_experts(params: Mapping[str, Any], sparse_layers: Sequence[int], num_experts: int) -> dict[str, Any] | None:
    """Makes the collection "unstacked", every decoder expert's kernels as arrays of their own, where parameters lie on one CPU.

    There a part of an array can share the memory of the whole. Elsewhere the result is None.
    """
    if not _on_one_cpu(params):
        return None

    def split(layer: Mapping[str, Any]) -> tuple[Kernels, ...]:
        stacked = {name: jax.tree.map(np.asarray, as_kernel(leaf)) for name, leaf in layer["mlp"]["expert"].items()}
        alone = lambda e: jax.tree.map(lambda kernel: jax.device_put(kernel[e], may_alias=True), stacked)  # noqa: E731
        return tuple(alone(e) for e in range(num_experts))

    names = [f"layers_{i}" for i in sparse_layers]
    return {"decoder": {name: {"mlp": {"experts": split(params["decoder"][name])}} for name in names}}


def as_kernel(params: Mapping[str, Any]) -> Kernel:
    """Returns the kernel among a layer's parameters, with its scales if it is quantised."""
    kernel, scale = params["kernel"], params.get(f"kernel{SCALE}")
    return kernel if scale is None else Quantized(kernel, scale)


def _on_one_cpu(params: Mapping[str, Any]) -> bool:
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, np.ndarray):
        return jax.default_backend() == "cpu"
    devices = leaf.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def few_rows(
    x: Float[Array, "R D"],
    expert: Int[Array, "R N"],
    mlp: MLP,
    *,
    stacked: Kernels,
    unstacked: Sequence[Kernels] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R N D_out"]:
    """Returns the outputs of every row's N experts.

    stacked: the experts' kernels with a leading axis E. unstacked: the same, an array each. implementation: one of
    IMPLEMENTATIONS; by default "switch" where experts are unstacked, and "gather" elsewhere.
    """
    implementation = implementation or ("gather" if unstacked is None else "switch")
    one_of("implementation", implementation, tuple(IMPLEMENTATIONS))
    return IMPLEMENTATIONS[implementation](x, expert, mlp, stacked, unstacked)


def _reference(x: Array, expert: Array, mlp: MLP, stacked: Kernels, unstacked: Sequence[Kernels] | None) -> Array:
    """Sends every row through every expert."""
    every = jax.vmap(lambda kernels: mlp(x, kernels, matmul=multiply), out_axes=1)(stacked)  # [R, E, D]
    return jnp.take_along_axis(every, expert[..., None], axis=1)


def _gather(x: Array, expert: Array, mlp: MLP, stacked: Kernels, unstacked: Sequence[Kernels] | None) -> Array:
    """Copies the kernels of each choice."""
    hit = {name: kernel[expert] for name, kernel in stacked.items()}
    x = jnp.broadcast_to(x[:, None], (*expert.shape, x.shape[-1]))
    return mlp(x, hit, matmul=lambda x, kernel: multiply(x[..., None, :], kernel)[..., 0, :])


def _switch(x: Array, expert: Array, mlp: MLP, stacked: Kernels, unstacked: Sequence[Kernels] | None) -> Array:
    """Jumps to each expert that is hit.

    Choices are sorted by expert and cut into blocks of one expert each. A block of one choice is a product of a vector, which is
    quicker than one of a whole block that is mostly padding.
    """
    assert unstacked is not None, "experts have to be arrays of their own"
    R, N = expert.shape
    size = min(R * N, BLOCK)
    run = [lambda rows, kernels=kernels: mlp(rows, kernels, matmul=multiply) for kernels in unstacked]
    if size == 1:
        return jax.lax.switch(expert[0, 0], run, x)[:, None]
    alone = [lambda rows, output=output: jnp.zeros_like(rows).at[:1].set(output(rows[:1])) for output in run]
    flat = expert.reshape(-1)
    order = jnp.argsort(flat)
    lengths = jax.nn.one_hot(flat, len(unstacked), dtype=jnp.int32).sum(0)
    starts = jnp.cumsum(lengths) - lengths
    blocks = -(-lengths // size)
    blocks_until = jnp.cumsum(blocks)

    def step(block, outputs):
        e = (blocks_until <= block).sum()
        start = starts[e] + size * (block - blocks_until[e] + blocks[e])
        places = start + jnp.arange(size)
        end = starts[e] + lengths[e]
        choices = jnp.where(places < end, order[jnp.minimum(places, R * N - 1)], R * N)
        rows = x[jnp.minimum(choices, R * N - 1) // N]
        branch = jnp.where(end - start == 1, e + len(unstacked), e)
        return outputs.at[choices].set(jax.lax.switch(branch, run + alone, rows), mode="drop")

    outputs = jnp.zeros((R * N, x.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, blocks_until[-1], step, outputs).reshape(R, N, -1)


IMPLEMENTATIONS = {"reference": _reference, "gather": _gather, "switch": _switch}
