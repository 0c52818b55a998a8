"""JAX's kernels for Hopper and Blackwell under our contract: interpreted, lowered, compiled, and stood in for by their demands."""

import functools
import importlib
import multiprocessing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_oracle import GROUPS, assert_products, operands
from jax.experimental.pallas import mosaic_gpu

from flax_switch.ops.kernels import grouped, grouped_mosaic, platforms
from flax_switch.ops.kernels.grouped_choice import MOSAIC
from flax_switch.plan import topology
from flax_switch.plan.flops import program_flops


class Described(NamedTuple):
    device_kind: str
    capability: tuple[int, int]
    multiprocessors: int


HOPPER, BLACKWELL = Described("NVIDIA H100 80GB HBM3", (9, 0), 132), Described("NVIDIA B200", (10, 0), 148)
GPUS = {"mosaic_hopper": HOPPER, "mosaic_blackwell": BLACKWELL}
B200 = topology.Chip(
    "b200", "gpu", 180 * 10**9, None, 1, topology.Gpu((10, 0), 148, 128, 228 * 2**10, 126 * 2**20, 8 * 10**12, 1.96, "NVIDIA B200")
)


def three_products(name, x, kernel, cotangent, group_sizes):
    rows, gradients = MOSAIC[name]
    return (
        rows(x, kernel, group_sizes, transpose=False),
        rows(cotangent, kernel, group_sizes, transpose=True),
        gradients(x, cotangent, group_sizes),
    )


@pytest.mark.skipif(not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX does not interpret all of Mosaic GPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_hoppers_kernels_interpreted_have_every_groups_own_products(dtype):
    sizes = [70, 0, 65, 1]
    arrays = operands(sizes, 128, 192, dtype, spare=7)
    few = HOPPER._replace(multiprocessors=2)
    with platforms.compiled_for("gpu", few), mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True)):
        products = jax.jit(functools.partial(three_products, "mosaic_hopper"))(*arrays, jnp.asarray(sizes, jnp.int32))
        assert_products(sizes, *arrays, *jax.block_until_ready(products))


def as_strict(module, name, seen):
    """Stands in for a kernel of JAX: refuses what it refuses, multiplies exactly, and leaves NaN in rows of no group."""

    def exact_rows(x, kernel, group_sizes, transpose):
        member = grouped._members(group_sizes, len(x)).any(0)
        return jnp.where(member[:, None], grouped._reference_rows(x, kernel, group_sizes, transpose=transpose), jnp.nan)

    def ragged_dot(x, kernel, *, group_sizes, block_m, block_n, block_k, max_concurrent_steps, grid_block_n, transpose_rhs):
        seen.append((block_m, block_n))
        assert (
            len(x) % 8 == 0
            and x.dtype == kernel.dtype
            and x.shape[1] % block_k == 0
            and kernel.shape[1 if transpose_rhs else 2] % block_n == 0
        )
        return exact_rows(x, kernel, group_sizes, transpose_rhs)

    def transposed_ragged_dot(x, gradient, *, group_sizes, block_m, block_n, block_k, max_concurrent_steps, grid_block_n):
        seen.append((block_m, block_n))
        assert len(x) % 8 == 0 and x.dtype == gradient.dtype and x.shape[1] % block_m == 0 and gradient.shape[1] % block_n == 0
        return grouped._reference_gradient(x, gradient, group_sizes)

    def ragged_dot_kernel(x, kernel, group_sizes, config):
        seen.append((2 * config.tile_m, 2 * config.tile_n))
        assert len(x) % (2 * config.tile_m) == 0 and x.shape[1] % config.tile_k == 0 and kernel.shape[2] % (2 * config.tile_n) == 0
        return exact_rows(x, kernel, group_sizes, False)

    getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}"), name)  # JAX has it
    return {"ragged_dot": ragged_dot, "transposed_ragged_dot": transposed_ragged_dot, "ragged_dot_kernel": ragged_dot_kernel}[name]


@pytest.mark.parametrize(
    ("name", "sizes", "widths", "tiles"),
    [
        ("mosaic_hopper", [70, 0, 65, 1, 120], (128, 192), {(64, 64), (64, 128)}),
        ("mosaic_hopper", [0, 130], (64, 128), {(128, 64), (128, 128)}),
        ("mosaic_hopper", GROUPS["none"], (64, 64), {(64, 64)}),
        ("mosaic_blackwell", [70, 0, 65, 1, 120], (128, 256), {(256, 128), (256, 256)}),
    ],
)
def test_values_and_gradients_are_the_contracts_where_kernels_get_what_they_demand(name, sizes, widths, tiles, monkeypatch):
    """No kernel has a gradient, and each leaves rows of no group as they were."""
    seen = []
    monkeypatch.setattr(grouped_mosaic, "_library", lambda module, function: as_strict(module, function, seen))
    x, kernel, cotangent = operands(sizes, *widths, jnp.bfloat16)
    multiply = functools.partial(grouped.grouped_matmul, group_sizes=jnp.asarray(sizes, jnp.int32), implementation=name)

    @jax.jit
    def with_gradients(x, kernel, cotangent):
        product, transpose = jax.vjp(multiply, x, kernel)
        return product, *transpose(cotangent)

    product, dx, dkernel = with_gradients(x, kernel, cotangent)
    assert_products(sizes, x, kernel, cotangent, product, dx, dkernel)
    assert {tile[:2] for tile in seen} >= tiles


def no_gpu_at_hand(gpu):
    device = jax.sharding.AbstractDevice(gpu.device_kind, None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=device))


def shapes(rows=4096, experts=8, sharding=None):
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    wide = [
        ((rows, 768), jnp.bfloat16),
        ((experts, 768, 3072), jnp.bfloat16),
        ((rows, 3072), jnp.bfloat16),
        ((experts,), jnp.int32),
    ]
    return [shape(*each) for each in wide]


def test_hoppers_kernels_lower_without_a_gpu_or_its_compiler():
    with platforms.compiled_for("gpu", HOPPER), no_gpu_at_hand(HOPPER):
        traced = jax.jit(functools.partial(three_products, "mosaic_hopper")).trace(*shapes())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3


def compiled_text(name, rows, experts):
    """The program of the three products for the GPU that the kernels are for."""
    machine = topology.parse_topology("h100:1") if name == "mosaic_hopper" else topology.Topology("b200:1", B200, 1)
    device = topology.compile_devices(machine)[0]
    on_it = shapes(rows, experts, jax.sharding.SingleDeviceSharding(device))
    with platforms.compiled_for("gpu", machine.chip.gpu):
        return jax.jit(functools.partial(three_products, name)).lower(*on_it).compile().as_text()


@pytest.mark.hardware("cuda")
@pytest.mark.parametrize(("name", "kernels"), [("mosaic_hopper", 3), ("mosaic_blackwell", 2)])
@pytest.mark.parametrize(("rows", "experts"), [(4096, 128), (1001, 8)])
def test_the_kernels_compile_for_their_gpus_without_them(name, kernels, rows, experts):
    """Down to machine code, each in a process of its own: Mosaic GPU keeps to the generation that it compiled for first."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        text = processes.apply(compiled_text, (name, rows, experts))
    assert text.count('custom_call_target="mosaic_gpu_v2"') == kernels
    if kernels == 3:  # Blackwell's third product is loops of unknown length
        assert program_flops(text) == (3 * 2 * (rows + -rows % 8) * 768 * 3072, True)


def test_a_gpu_that_is_here_is_asked_itself(monkeypatch):
    """Nothing of JAX's kernels is replaced there."""
    monkeypatch.setattr(platforms, "_gpu_here", lambda: platforms.GpuHere("NVIDIA H100 80GB HBM3", (9, 0), 132))
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu").transposed_ragged_dot
    assert grouped_mosaic._library("transposed_ragged_dot_mgpu", "transposed_ragged_dot") is kernel
    with platforms.compiled_for("gpu", HOPPER):
        copy = grouped_mosaic._library("transposed_ragged_dot_mgpu", "transposed_ragged_dot")
    assert copy is not kernel and copy.__code__ is kernel.__code__
    np.testing.assert_array_equal([d.core_count for d in copy.__globals__["jax"].devices()], [132])
