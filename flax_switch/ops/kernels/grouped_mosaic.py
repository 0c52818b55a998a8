"""Grouped GEMM on NVIDIA's Hopper and Blackwell: Pallas kernels for Mosaic GPU that come with JAX, under this package's contract.

They take 16-bit floats, rows that 8 or whole tiles divide and widths that tiles divide, leave rows of no group as they were in
memory, and have no gradients. Here rows are filled up, those of no group are made zeros, and tiles are chosen by shape. Products
add up in float32. Hopper has a kernel for each product; Blackwell's multiplies rows alone, so that kernels are transposed
beforehand, and their gradients are the loops of `grouped_blocks`.

None of this has run on a GPU here: it is compiled for both, by `ptxas` too, and Hopper's kernels are interpreted on a CPU.
"""

import importlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_switch.ops.kernels import platforms

CONTRACTED = 64  # of the axis that is summed over, in a tile: 128 bytes, which is what tensor cores read in one piece
STAGES = 4  # tiles in flight: of the largest, 160 of the 227 KiB of shared memory
COLUMN_TILES = 8  # so many tiles of columns run over all rows before the next ones begin: the cache holds what they share
EIGHT = 8  # what divides the rows that are read in tiles, of Hopper's kernels
PAIR = 256  # rows of a tile that two of Blackwell's multiprocessors share
MULTIPROCESSORS = 132  # of the GPU that is taken where nothing is known of it, an H100


def hopper_rows(x: Float[Array, "R K"], kernel: Array, group_sizes: Int[Array, " E"], *, transpose: bool) -> Float[Array, "R N"]:
    """Multiplies row r by the kernel, [E, K, N], of its expert, or with `transpose` by that of [E, N, K]."""
    ragged_dot = _library("ragged_dot_mgpu", "ragged_dot")
    with jax.named_scope("grouped_rows"):
        product = ragged_dot(
            _filled(x, EIGHT), kernel, group_sizes=group_sizes,
            transpose_rhs=transpose, block_k=CONTRACTED, max_concurrent_steps=STAGES,
            block_m=128 if len(x) > 64 * len(kernel) else 64, block_n=_tile(kernel.shape[1 if transpose else 2]),
            grid_block_n=COLUMN_TILES,
        )  # fmt: skip
    return within_groups(product[: len(x)], group_sizes)


def hopper_gradients(x: Float[Array, "R D"], gradient: Float[Array, "R F"], group_sizes: Int[Array, " E"]) -> Float[Array, "E D F"]:
    """Returns for every group the product `x^T gradient` of its rows; zero for a group without any.

    Tiles of 64 rows are multiplied by zeros where they are a neighbour's, so that numbers that are not finite spread as far.
    """
    transposed_ragged_dot = _library("transposed_ragged_dot_mgpu", "transposed_ragged_dot")
    with jax.named_scope("grouped_gradients"):
        return transposed_ragged_dot(
            _filled(x, EIGHT), _filled(gradient, EIGHT), group_sizes=group_sizes, block_k=CONTRACTED, max_concurrent_steps=STAGES,
            block_m=_tile(x.shape[1]), block_n=_tile(gradient.shape[1]), grid_block_n=COLUMN_TILES,
        )  # fmt: skip


def blackwell_rows(x: Float[Array, "R K"], kernel: Array, group_sizes: Int[Array, " E"], *, transpose: bool) -> Float[Array, "R N"]:
    """Multiplies row r by the kernel, [E, K, N], of its expert, or with `transpose` by that of [E, N, K]."""
    library = importlib.import_module("jax.experimental.pallas.ops.gpu.blackwell_ragged_dot_mgpu")
    columns = importlib.import_module("jax.experimental.pallas.ops.gpu.blackwell_matmul_mgpu").MatmulDimension.N
    kernel = kernel.swapaxes(1, 2) if transpose else kernel
    config = library.TuningConfig(
        tile_m=PAIR // 2, tile_n=64 if kernel.shape[2] % 256 else 128, tile_k=CONTRACTED, max_concurrent_steps=STAGES,
        collective=True, grid_tile_width=COLUMN_TILES, grid_minor_dim=columns,
    )  # fmt: skip
    with jax.named_scope("grouped_rows"):
        product = _library("blackwell_ragged_dot_mgpu", "ragged_dot_kernel")(_filled(x, PAIR), kernel, group_sizes, config)
    return within_groups(product[: len(x)], group_sizes)


def within_groups(product: Float[Array, "R N"], group_sizes: Int[Array, " E"]) -> Float[Array, "R N"]:
    """Returns the rows of groups, and zeros for those beyond the groups, whatever is there."""
    return jnp.where(jnp.arange(len(product))[:, None] < group_sizes.sum(), product, 0)


def _filled(x: Array, divisor: int) -> Array:
    """Returns the rows, with rows of no group after them until their number is a multiple of the divisor."""
    return jnp.pad(x, [(0, -len(x) % divisor), (0, 0)])


def _tile(size: int) -> int:
    return 64 if size % 128 else 128


def _library(module: str, name: str) -> Callable[..., Any]:
    """Returns a function of JAX's kernels.

    They ask JAX's first device for its multiprocessors. Where a program is made for a GPU that is not here, as a plan's are, the
    function sees a `jax` whose first device is that GPU.
    """
    function = getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}"), name)
    gpu = platforms.gpu()
    if isinstance(gpu, platforms.GpuHere):
        return function
    devices = [types.SimpleNamespace(core_count=gpu.multiprocessors if gpu else MULTIPROCESSORS)]
    seen = types.SimpleNamespace(**{**vars(jax), "devices": lambda: devices, "local_devices": lambda: devices})
    copy = types.FunctionType(function.__code__, {**vars(importlib.import_module(function.__module__)), "jax": seen})
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
