"""Grouped GEMM for any platform: loops over blocks of rows, each of which belongs to one expert."""

import math
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from flax_switch.ops.kernels import Size
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.projection import kernel_gradient
from flax_switch.ops.kernels.quantized import Kernel, multiply

# Row counts of the blocks that loops take: these times a unit, a quarter of the mean group and no fewer than MIN_UNIT rows.
# Reading an expert's kernel costs as much as some 64 rows, so that a group takes one block of the smallest size that holds it. A
# product of rows first cuts blocks of the largest size from a group that none holds; a kernel's gradient, which adds up over its
# blocks, takes several of the largest. One size more, BALANCED times the mean, holds balanced groups. Each is a loop to compile.
BLOCKS = (1, 2, 4, 6, 8)
BALANCED = 1.25
MIN_UNIT = 32


@flax.struct.dataclass
class Blocks:
    """Blocks of `size` rows, one or more for each expert whose group takes this size."""

    size: int = flax.struct.field(pytree_node=False)
    num_blocks: Int[Array, ""]
    last_block: Int[Array, " E"]  # cumulative number of blocks up to and with each expert's
    starts: Int[Array, " E"]  # first row of each expert's first block
    ends: Int[Array, " E"]  # of each group

    def block(self, index: Int[Array, ""], num_rows: Size) -> tuple[Array, Array, Bool[Array, "size 1"]]:
        """Returns the expert of block `index`, its first row, and which of its rows are that expert's."""
        expert = (self.last_block <= index).sum(dtype=jnp.int32)
        before = jnp.where(expert > 0, self.last_block[expert - 1], 0)
        start = self.starts[expert] + (index - before) * self.size
        first = jnp.minimum(start, num_rows - self.size)  # the last block moves up rather than reach over the end
        rows = first + jnp.arange(self.size)[:, None]
        return expert, first, (rows >= start) & (rows < jnp.minimum(start + self.size, self.ends[expert]))


def _running_total(counts: Int[Array, " E"]) -> Int[Array, " E"]:
    """Sums cumulatively as a masked sum: XLA compiles it in a fraction of the time, and E is small."""
    experts = jnp.arange(counts.shape[0])
    return jnp.where(experts[:, None] >= experts[None], counts[None], 0).sum(1, dtype=jnp.int32)


def block_sizes(num_rows: Size, num_groups: int) -> list[int]:
    """Returns the sizes of blocks, in order; for any number of rows the smallest, with room for the largest taken for granted."""
    if not isinstance(num_rows, int):
        return [MIN_UNIT * multiple for multiple in BLOCKS]
    mean = num_rows / num_groups
    unit, balanced = (max(MIN_UNIT, 8 * math.ceil(rows / 8)) for rows in (mean / 4, BALANCED * mean))
    return sorted({min(num_rows, size) for size in (balanced, *(unit * multiple for multiple in BLOCKS))})


def row_blocks(group_sizes: Int[Array, " E"], num_rows: Size, *, cut: bool) -> Iterator[Blocks]:
    """Yields the blocks, size by size. Groups without rows get none: their kernels are never read.

    cut: whether a group is cut into full blocks of the largest size and a smaller one for the rest.
    """
    sizes = block_sizes(num_rows, group_sizes.shape[0])
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


def zeros(shape: tuple[Size, ...], dtype: DTypeLike, group_sizes: Int[Array, " E"]) -> Array:
    """Returns zeros for a loop to write into. XLA must not know that they are zeros: it would copy one array for each loop."""
    return jnp.full(shape, jnp.minimum(group_sizes[0], 0).astype(dtype))


def block_rows(x: Array, kernel: Kernel, group_sizes: Array, *, transpose: bool) -> Array:
    """Multiplies sorted rows by their experts' kernels, or the transposes of those that are floats, in loops over blocks."""
    given = x.shape[0]
    if not isinstance(given, int):  # there may be fewer than a block takes
        x = jnp.pad(x, [(0, MIN_UNIT * BLOCKS[-1]), (0, 0)])
    num_rows = x.shape[0]
    out = zeros((num_rows, kernel.shape[1 if transpose else 2]), x.dtype, group_sizes)
    for blocks in row_blocks(group_sizes, num_rows, cut=True):

        def step(index, out, blocks=blocks):
            expert, first, own = blocks.block(index, num_rows)
            rows = lax.dynamic_slice_in_dim(x, first, blocks.size)
            one = lambda stack: lax.dynamic_index_in_dim(stack, expert, keepdims=False)  # noqa: E731
            matrix: Any = kernel[expert] if isinstance(kernel, Narrow) else jax.tree.map(one, kernel)
            product = multiply(rows, matrix.T if transpose else matrix)
            others = lax.dynamic_slice_in_dim(out, first, blocks.size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, product, others), first, 0)

        out = lax.fori_loop(0, blocks.num_blocks, step, out)
    return lax.slice_in_dim(out, 0, given)


def block_gradients(x: Array, gradient: Array, group_sizes: Array) -> Array:
    """Sums each group's `x^T gradient` in loops over blocks, in float32."""
    num_rows = x.shape[0]
    out = zeros((group_sizes.shape[0], x.shape[1], gradient.shape[1]), x.dtype, group_sizes)
    *single, several = row_blocks(group_sizes, num_rows, cut=False)
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
