"""Experts' outputs for a few rows, as in decoding: only the experts that are hit are read.

gather      copies the kernels of each choice; quick on an accelerator
switch      jumps to each expert that is hit, once for all rows that hit it. For a CPU, which must not copy an expert's kernels to
            read them: a slice of the stack at an index found while running is a copy. Experts are arrays of their own here
reference   every row through every expert
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import one_of
from flax_switch.config.weights import BIAS, SCALE
from flax_switch.ops.kernels.on_disk import OnDisk, first_on_disk
from flax_switch.ops.kernels.quantized import Kernel, multiply, with_scale

Kernels = Mapping[str, Kernel]
MLP = Callable[..., Array]  # `ops.mlp.mlp` with all but rows, kernels and product settled

BLOCK = 16  # choices of the same expert that go together; reading its kernels costs as much as their product


def unstacked_experts(params: Mapping[str, Any], sparse_layers: Sequence[int], num_experts: int) -> dict[str, Any] | None:
    """Makes the collection "unstacked", every decoder expert's kernels as arrays of their own, where parameters lie on one CPU.

    There a part of an array can share the memory of the whole. Elsewhere the result is None. Experts on disk stay there.
    """
    if not _on_one_cpu(params):
        return None

    def split(layer: Mapping[str, Any]) -> tuple[Any, ...] | OnDisk:
        if (found := first_on_disk(layer["mlp"]["expert"])) is not None:
            return found
        stacked = jax.tree.map(np.asarray, as_kernels(layer["mlp"]["expert"]))
        return tuple(jax.tree.map(operator.itemgetter(e), stacked) for e in range(num_experts))

    layers = {f"layers_{i}": split(params["decoder"][f"layers_{i}"]) for i in sparse_layers}
    in_memory = {name: experts for name, experts in layers.items() if not isinstance(experts, OnDisk)}
    layers |= jax.device_put(in_memory, may_alias=True)  # at once: with 128 experts these are thousands of arrays in each call
    return {"decoder": {name: {"mlp": {"experts": experts}} for name, experts in layers.items()}}


def as_kernel(params: Mapping[str, Any]) -> Kernel:
    """Returns the kernel among a layer's parameters, with its scales if it is quantised."""
    return with_scale(params["kernel"], params.get(f"kernel{SCALE}"))


def as_kernels(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Kernel]:
    """Returns the kernels among the parameters of an MLP, or of experts, with their biases as kernels of one row."""
    biases = {f"{name}{BIAS}": leaf["bias"][..., None, :] for name, leaf in params.items() if "bias" in leaf}
    return {**{name: as_kernel(leaf) for name, leaf in params.items()}, **biases}


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
    run = [lambda rows, kernels=kernels: mlp(rows, kernels, matmul=multiply) for kernels in unstacked]
    choices = SortedChoices.of(expert, len(unstacked))
    if choices.size == 1:
        return jax.lax.switch(expert[0, 0], run, x)[:, None]
    branches = [*run, *map(alone, run)]
    blocks_until = jnp.cumsum(choices.blocks)

    def step(block, outputs):
        e = (blocks_until <= block).sum()
        places, rows, single = choices.block(x, e, block - blocks_until[e] + choices.blocks[e])
        branch = jnp.where(single, e + len(unstacked), e)
        return outputs.at[places].set(jax.lax.switch(branch, branches, rows), mode="drop")

    outputs = jnp.zeros((expert.size, x.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, blocks_until[-1], step, outputs).reshape(*expert.shape, -1)


@flax.struct.dataclass
class SortedChoices:
    """The choices of few rows by expert, cut into blocks of one expert each."""

    size: int = flax.struct.field(pytree_node=False)  # of a block
    selected: int = flax.struct.field(pytree_node=False)  # N
    order: Int[Array, " RN"]  # the choices, sorted by expert
    starts: Int[Array, " E"]  # the place of each expert's first
    lengths: Int[Array, " E"]
    blocks: Int[Array, " E"]  # how many each expert has

    @classmethod
    def of(cls, expert: Int[Array, "R N"], num_experts: int) -> Self:
        """Sorts choices by expert."""
        flat, size = expert.reshape(-1), min(expert.size, BLOCK)
        lengths = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32).sum(0)
        return cls(size, expert.shape[1], jnp.argsort(flat), jnp.cumsum(lengths) - lengths, lengths, -(-lengths // size))

    def block(
        self, x: Float[Array, "R D"], expert: Int[Array, ""], number: Int[Array, ""]
    ) -> tuple[Int[Array, " size"], Float[Array, "size D"], Bool[Array, ""]]:
        """Returns the choices of an expert's block (past their number where it is not full), their rows, and if it is one alone."""
        total = self.order.shape[0]
        start, end = self.starts[expert] + self.size * number, self.starts[expert] + self.lengths[expert]
        places = start + jnp.arange(self.size)
        choices = jnp.where(places < end, self.order[jnp.minimum(places, total - 1)], total)
        return choices, x[jnp.minimum(choices, total - 1) // self.selected], end - start == 1


def alone(run: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Returns the function for a block of which only the first row counts: a vector's product is quicker."""
    return lambda rows: jnp.zeros_like(rows).at[:1].set(run(rows[:1]))


IMPLEMENTATIONS = {"reference": _reference, "gather": _gather, "switch": _switch}
