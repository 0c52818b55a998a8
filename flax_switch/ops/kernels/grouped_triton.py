"""Grouped GEMM on NVIDIA GPUs: Pallas kernels, compiled by Triton, whose programs each compute one tile of the result.

Rows times kernels: a tile of rows begins where its expert's group begins, so no tile holds rows of two experts and none is visited
twice; R rows of E experts need at most R / tile + E + 1 of them, and those that a routing leaves unused return at once. Kernel
gradients: one program for each tile of each expert's kernel walks over the rows of that expert. Both add up in float32; float32
factors are multiplied as `jax.default_matmul_precision` says, which is TF32 unless set, as everywhere on these GPUs.

Pallas's Triton back end is deprecated since JAX 0.11, and these kernels are no implementation there (`grouped_choice.WITH_TRITON`);
Pallas's other one for GPUs, Mosaic, compiles for Hopper and newer only. This is the one module that imports it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

# The largest tile of the result, and the contraction's part of a tile in bytes: three stages of both factors fit into the shared
# memory of every NVIDIA GPU since Ampere. 16 is the least that its tensor cores take.
TILE = 128
CONTRACTION_BYTES = 128
LEAST = 16
COMPILER = triton.CompilerParams(num_warps=8, num_stages=3)
ROW_TILES = 8  # so many tiles of rows run over all columns before the next ones begin: the cache holds what they share


def grouped_rows(
    x: Float[Array, "R K"], kernel: Array, group_sizes: Int[Array, " E"], *, transpose: bool = False, interpret: bool = False
) -> Float[Array, "R N"]:
    """Multiplies row r by the kernel, [E, K, N], of the expert in whose group it is, or with `transpose` by that of [E, N, K].

    Rows beyond all groups come out zero. Nothing is read of the kernels of experts without rows. `interpret` runs on any platform.
    """
    num_rows, num_columns = x.shape[0], kernel.shape[1 if transpose else 2]
    rows, columns, depth = _row_tile(num_rows, kernel.shape[0]), _tile(num_columns), _depth(x.shape[1], x.dtype)
    tiles = row_tiles(group_sizes, num_rows, rows)
    body = functools.partial(_rows_program, rows=rows, columns=columns, depth=depth, transpose=transpose)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        grid=(tiles.shape[0] * pl.cdiv(num_columns, columns),),
        compiler_params=COMPILER,
        interpret=interpret,
        name="grouped_rows",
    )(tiles, x, kernel)


def grouped_gradients(
    x: Float[Array, "R D"], gradient: Float[Array, "R F"], group_sizes: Int[Array, " E"], *, interpret: bool = False
) -> Float[Array, "E D F"]:
    """Returns for every group the product `x^T gradient` of its rows; zero for a group without any."""
    inputs, outputs, depth = _tile(x.shape[1]), _tile(gradient.shape[1]), _depth(x.shape[0], x.dtype)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    body = functools.partial(_gradients_program, inputs=inputs, outputs=outputs, depth=depth)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((group_sizes.shape[0], x.shape[1], gradient.shape[1]), x.dtype),
        grid=(pl.cdiv(x.shape[1], inputs), pl.cdiv(gradient.shape[1], outputs), group_sizes.shape[0]),
        compiler_params=COMPILER,
        interpret=interpret,
        name="grouped_gradients",
    )(jnp.stack([ends - group_sizes, ends], axis=1).astype(jnp.int32), x, gradient)


def row_tiles(group_sizes: Int[Array, " E"], num_rows: int, tile: int) -> Int[Array, "tiles 3"]:
    """Returns for every tile of rows its group, its first row and its end.

    There are as many tiles as groups of any sizes can need; those that these groups do not need are empty. Rows beyond all groups
    are group E's.
    """
    num_groups = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, num_rows - group_sizes.sum()).astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    last_tile = jnp.cumsum(-(-sizes // tile), dtype=jnp.int32)
    index = jnp.arange((num_rows + (num_groups + 1) * (tile - 1)) // tile, dtype=jnp.int32)
    group = jnp.minimum((last_tile[None] <= index[:, None]).sum(1, dtype=jnp.int32), num_groups)
    start = (ends - sizes)[group] + tile * (index - jnp.where(group > 0, last_tile[group - 1], 0))
    return jnp.stack([group, *(jnp.minimum(row, ends[group]) for row in (start, start + tile))], axis=1)


def _rows_program(tiles_ref, x_ref, kernel_ref, out_ref, *, rows: int, columns: int, depth: int, transpose: bool):
    """Computes one tile of `grouped_rows`."""
    num_groups, size, num_columns = kernel_ref.shape[0], x_ref.shape[1], out_ref.shape[1]
    row_index, column_index = _tile_of_program(pl.program_id(0), tiles_ref.shape[0], pl.cdiv(num_columns, columns))
    group, start, end = (tiles_ref[row_index, i] for i in range(3))
    column = column_index * columns
    own = start + jnp.arange(rows) < end
    inside = column + jnp.arange(columns) < num_columns

    def step(i, total):
        k = i * depth
        within = k + jnp.arange(depth) < size
        part = _load(x_ref.at[pl.ds(start, rows), pl.ds(k, depth)], own[:, None] & within[None])
        if transpose:
            matrix = _load(kernel_ref.at[group, pl.ds(column, columns), pl.ds(k, depth)], inside[:, None] & within[None])
        else:
            matrix = _load(kernel_ref.at[group, pl.ds(k, depth), pl.ds(column, columns)], within[:, None] & inside[None])
        return total + triton.dot(part, matrix, trans_b=transpose)

    @pl.when(start < end)
    def _():
        steps = lax.select(group < num_groups, jnp.int32(pl.cdiv(size, depth)), jnp.int32(0))
        total = lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
        triton.store(
            out_ref.at[pl.ds(start, rows), pl.ds(column, columns)], total.astype(out_ref.dtype), mask=own[:, None] & inside[None]
        )


def _gradients_program(ranges_ref, x_ref, gradient_ref, out_ref, *, inputs: int, outputs: int, depth: int):
    """Computes one tile of `grouped_gradients`."""
    row, column, group = pl.program_id(0) * inputs, pl.program_id(1) * outputs, pl.program_id(2)
    start, end = ranges_ref[group, 0], ranges_ref[group, 1]
    in_rows = row + jnp.arange(inputs) < x_ref.shape[1]
    in_columns = column + jnp.arange(outputs) < gradient_ref.shape[1]

    def step(i, total):
        first = start + i * depth
        own = (first + jnp.arange(depth) < end)[:, None]
        part = _load(x_ref.at[pl.ds(first, depth), pl.ds(row, inputs)], own & in_rows[None])
        other = _load(gradient_ref.at[pl.ds(first, depth), pl.ds(column, outputs)], own & in_columns[None])
        return total + triton.dot(part, other, trans_a=True)

    total = lax.fori_loop(0, pl.cdiv(end - start, depth), step, jnp.zeros((inputs, outputs), jnp.float32))
    triton.store(
        out_ref.at[group, pl.ds(row, inputs), pl.ds(column, outputs)],
        total.astype(out_ref.dtype),
        mask=in_rows[:, None] & in_columns[None],
    )


def _load(ref, mask):
    return triton.load(ref, mask=mask, other=0.0)


def _tile_of_program(program, num_rows: int, num_columns: int):
    """Returns which tile of rows and columns a program computes: `ROW_TILES` tiles of rows over all columns, then the next."""
    block = jnp.int32(ROW_TILES * num_columns)
    first = lax.div(program, block) * ROW_TILES
    height, place = jnp.minimum(num_rows - first, ROW_TILES), lax.rem(program, block)
    return first + lax.rem(place, height), lax.div(place, height)


def _row_tile(num_rows: int, num_groups: int) -> int:
    """Returns how many rows a tile has: no more than twice what the mean group fills."""
    return _tile(-(-num_rows // num_groups))


def _depth(size: int, dtype: jnp.dtype) -> int:
    return _tile(size, CONTRACTION_BYTES // jnp.dtype(dtype).itemsize)


def _tile(size: int, most: int = TILE) -> int:
    """Returns the power of two that a tile takes of an axis of this size."""
    return min(most, max(LEAST, pl.next_power_of_2(size)))
