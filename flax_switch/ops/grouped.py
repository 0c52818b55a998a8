"""Products of many rows with many experts' kernels: equal buffers for each expert, or sorted rows in groups of any size.

The one place that knows which backend runs which kernel:

    equal buffers   a batched product
    sorted rows     TPU: `lax.ragged_dot`, which XLA compiles to a grouped kernel there; for the kernels' gradients, where it does
                    not, the Pallas kernel that comes with JAX. NVIDIA GPU: our Pallas kernels, in ops/grouped_gpu.py. Elsewhere:
                    loops over blocks of rows. XLA's `lax.ragged_dot` computes every expert for every row on CPU and on GPUs

What was counted and what was measured, and on which hardware, is in docs/moe.md.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_switch.compilers import can_compile_for
from flax_switch.ops.projection import kernel_gradient

# Branches for other devices need not be traced.
POSSIBLE = tuple(platform for platform in ("tpu", "cuda") if can_compile_for(platform))
# Row counts of the blocks that loops take: these times a unit, a quarter of the mean group and no fewer than MIN_UNIT rows.
# Reading an expert's kernel costs as much as some 64 rows, so that a group takes one block of the smallest size that holds it. A
# product of rows first cuts blocks of the largest size from a group that none holds; a kernel's gradient, which adds up over its
# blocks, takes several of the largest. One size more, BALANCED times the mean, holds balanced groups. Each is a loop to compile.
BLOCKS = (1, 2, 4, 6, 8)
BALANCED = 1.25
MIN_UNIT = 32


@jax.custom_vjp
def batched_matmul(x: Float[Array, "G E C D"], kernel: Float[Array, "E D F"]) -> Float[Array, "G E C F"]:
    """Each expert's product with the rows of its buffer."""
    return _by_expert(x, kernel, transpose=False)


def _by_expert(x: Float[Array, "G E C D"], kernel: Array, *, transpose: bool) -> Float[Array, "G E C F"]:
    """x times each expert's kernel, or the kernel's transpose."""
    rows = _together(x)
    if transpose:  # the kernel as the left factor is read where it lies; as the right one a CPU transposes it first
        product = jnp.einsum("EFD,ERD->EFR", kernel, rows).swapaxes(1, 2)
    else:
        product = jnp.einsum("ERD,EDF->ERF", rows, kernel)
    return product.reshape(x.shape[1], x.shape[0], -1, product.shape[2]).swapaxes(0, 1)


def _together(x: Float[Array, "G E C D"]) -> Float[Array, "E R D"]:
    """All rows of an expert, whatever their group: with two axes of rows XLA transposes the whole product on a CPU."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])


def _batched_forward(x, kernel):
    return batched_matmul(x, kernel), (x, kernel)


def _batched_backward(residuals, gradient):
    x, kernel = residuals
    return _by_expert(gradient, kernel, transpose=True), jnp.einsum("ERD,ERF->EDF", _together(x), _together(gradient))


batched_matmul.defvjp(_batched_forward, _batched_backward)


@jax.custom_vjp
def grouped_matmul(x: Float[Array, "R D"], kernel: Float[Array, "E D F"], group_sizes: Int[Array, " E"]) -> Float[Array, "R F"]:
    """Row r times the kernel of the expert in whose group it is; rows beyond the sum of the groups come out zero.

    group_sizes: the first group_sizes[0] rows are expert 0's, and so on.
    """
    return _grouped_rows(x, kernel, group_sizes, transpose=False)


def _grouped_forward(x, kernel, group_sizes):
    return grouped_matmul(x, kernel, group_sizes), (x, kernel, group_sizes)


def _grouped_backward(residuals, gradient):
    x, kernel, group_sizes = residuals
    return (
        _grouped_rows(gradient, kernel, group_sizes, transpose=True),
        _by_platform(x, gradient, group_sizes, tpu=_tpu_kernels, cuda=_gpu("grouped_kernels"), elsewhere=_block_kernels),
        None,
    )


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _grouped_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Rows times their experts' kernels, or the kernels' transposes."""
    tpu, cuda, elsewhere = (
        functools.partial(product, transpose=transpose) for product in (_ragged_rows, _gpu("grouped_rows"), _block_rows)
    )
    return _by_platform(x, kernel, group_sizes, tpu=tpu, cuda=cuda, elsewhere=elsewhere)


def _by_platform(*args: Array, elsewhere: Callable[..., Array], **on_platform: Callable[..., Array]) -> Array:
    """Calls the function for the platform that the program is compiled for."""
    possible = {platform: function for platform, function in on_platform.items() if platform in POSSIBLE}
    return lax.platform_dependent(*args, **possible, default=elsewhere) if possible else elsewhere(*args)


def _gpu(name: str) -> Callable[..., Array]:
    """A function of the module with the kernels for GPUs, which is imported, and Pallas with it, where one is to be traced."""
    return lambda *args, **options: getattr(importlib.import_module("flax_switch.ops.grouped_gpu"), name)(*args, **options)


def _ragged_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Sorted rows times kernels by XLA's own grouped product."""
    contract = lax.RaggedDotDimensionNumbers(
        (((1,), (2 if transpose else 1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(x, kernel, group_sizes, contract)


def _tpu_kernels(x: Array, gradient: Array, group_sizes: Array, *, interpret: bool = False) -> Array:
    """Each group's `x^T gradient` by a Pallas kernel for TPUs (`lax.ragged_dot_general` costs E times the FLOPs here)."""
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    tile = 512 if x.shape[0] > 128 * group_sizes.shape[0] else 128
    missing = -x.shape[0] % tile  # the kernel wants whole tiles of rows; those added are in no group
    x, gradient = (jnp.pad(a, [(0, missing), (0, 0)]) for a in (x, gradient))
    tiles = (tile, min(512, x.shape[1]), min(512, gradient.shape[1]))
    return megablox.tgmm(x.T, gradient, group_sizes, x.dtype, tiles, interpret=interpret)


@flax.struct.dataclass
class Blocks:
    """The blocks of `size` rows, one or more for each expert that has some."""

    size: int = flax.struct.field(pytree_node=False)
    num_blocks: Int[Array, ""]
    last_block: Int[Array, " E"]  # cumulative number of blocks up to and with each expert's
    starts: Int[Array, " E"]  # first row of each expert's first block
    ends: Int[Array, " E"]  # of each group

    def block(self, index: Int[Array, ""], num_rows: int) -> tuple[Array, Array, Bool[Array, "size 1"]]:
        """Block `index`: its expert, its first row, and which of its rows are the expert's own."""
        expert = (self.last_block <= index).sum(dtype=jnp.int32)
        before = jnp.where(expert > 0, self.last_block[expert - 1], 0)
        start = self.starts[expert] + (index - before) * self.size
        first = jnp.minimum(start, num_rows - self.size)  # the last block moves up rather than reach over the end
        rows = first + jnp.arange(self.size)[:, None]
        return expert, first, (rows >= start) & (rows < jnp.minimum(start + self.size, self.ends[expert]))


def _running_total(counts: Int[Array, " E"]) -> Int[Array, " E"]:
    """A cumulative sum as a masked one: XLA compiles it in a fraction of the time, and E is small."""
    experts = jnp.arange(counts.shape[0])
    return jnp.where(experts[:, None] >= experts[None], counts[None], 0).sum(1, dtype=jnp.int32)


def _blocks(group_sizes: Int[Array, " E"], num_rows: int, *, cut: bool) -> Iterator[Blocks]:
    """The blocks, size by size. Groups without rows get none: their kernels are never read.

    cut: whether what full blocks of the largest size leave of a group goes into a smaller one.
    """
    mean = num_rows / group_sizes.shape[0]
    unit, balanced = (max(MIN_UNIT, 8 * math.ceil(rows / 8)) for rows in (mean / 4, BALANCED * mean))
    sizes = sorted({min(num_rows, size) for size in (balanced, *(unit * multiple for multiple in BLOCKS))})
    ends = _running_total(group_sizes)
    starts = ends - group_sizes
    full = group_sizes // sizes[-1] if cut else jnp.zeros_like(group_sizes)
    rest = group_sizes - full * sizes[-1]
    size_class = (rest[:, None] > jnp.asarray(sizes[:-1])[None]).sum(1)
    for i, size in enumerate(sizes):
        count = jnp.where((size_class == i) & (rest > 0), -(-rest // size), 0)
        if size == sizes[-1]:
            count, first = count + full, starts
        else:
            first = starts + full * sizes[-1]
        last_block = _running_total(count)
        yield Blocks(size, last_block[-1], last_block, first, ends)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, group_sizes: Int[Array, " E"]) -> Array:
    """Zeros for a loop to write into; were XLA to know them as zeros, it would keep one array and copy it for each loop."""
    return jnp.full(shape, jnp.minimum(group_sizes[0], 0).astype(dtype))


def _block_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Sorted rows times kernels by loops over blocks."""
    num_rows = x.shape[0]
    out = _zeros((num_rows, kernel.shape[1 if transpose else 2]), x.dtype, group_sizes)
    for blocks in _blocks(group_sizes, num_rows, cut=True):

        def step(index, out, blocks=blocks):
            expert, first, own = blocks.block(index, num_rows)
            rows = lax.dynamic_slice_in_dim(x, first, blocks.size)
            matrix = lax.dynamic_index_in_dim(kernel, expert, keepdims=False)
            product = rows @ (matrix.T if transpose else matrix)
            others = lax.dynamic_slice_in_dim(out, first, blocks.size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, product, others), first, 0)

        out = lax.fori_loop(0, blocks.num_blocks, step, out)
    return out


def _block_kernels(x: Array, gradient: Array, group_sizes: Array) -> Array:
    """Each group's `x^T gradient` by loops over blocks, added up in float32."""
    num_rows = x.shape[0]
    out = _zeros((group_sizes.shape[0], x.shape[1], gradient.shape[1]), x.dtype, group_sizes)
    *single, several = _blocks(group_sizes, num_rows, cut=False)
    for blocks in (*single, several):

        def one_block(index, blocks=blocks):
            expert, first, own = blocks.block(index, num_rows)
            rows = jnp.where(own, lax.dynamic_slice_in_dim(x, first, blocks.size), 0)
            others = lax.dynamic_slice_in_dim(gradient, first, blocks.size)
            return expert, kernel_gradient(rows, others, jnp.float32)

        def one_expert(carry, blocks=blocks, one_block=one_block):
            index, out = carry
            expert, total = one_block(index)
            end = index + 1
            if blocks is several:
                end = blocks.last_block[expert]
                total = lax.fori_loop(index + 1, end, lambda i, total: total + one_block(i)[1], total)
            return end, lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, 0)

        unfinished = lambda carry, blocks=blocks: carry[0] < blocks.num_blocks  # noqa: E731
        _, out = lax.while_loop(unfinished, one_expert, (jnp.zeros((), jnp.int32), out))
    return out
