"""The kernels for GPUs: interpreted, against one product for each group; and what Triton is given, by its own verifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_oracle import GROUPS, assert_products, operands
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from flax_switch.ops.kernels import grouped_choice

if not grouped_choice.WITH_TRITON:
    pytest.skip("Pallas's Triton back end is deprecated in this JAX, and nothing picks these kernels", allow_module_level=True)

from jaxlib.triton import dialect  # noqa: E402

from flax_switch.ops.kernels import grouped_triton  # noqa: E402


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (200, 300)])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_every_group_has_its_own_products(sizes, inputs, outputs, dtype):
    x, kernel, cotangent = operands(sizes, inputs, outputs, dtype)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    product = grouped_triton.grouped_rows(x, kernel, group_sizes, interpret=True)
    dx = grouped_triton.grouped_rows(cotangent, kernel, group_sizes, transpose=True, interpret=True)
    dkernel = grouped_triton.grouped_gradients(x, cotangent, group_sizes, interpret=True)
    assert_products(sizes, x, kernel, cotangent, product, dx, dkernel)


def test_tiles_take_every_row_once_and_no_tile_two_groups():
    rng = np.random.default_rng(0)
    row_tiles = jax.jit(grouped_triton.row_tiles, static_argnums=(1, 2))
    for num_groups, tile in ((1, 16), (5, 16), (64, 128), (7, 64)):
        for spare in (0, 1, 300):
            sizes = rng.multinomial(rng.integers(1, 900), rng.dirichlet([0.2] * num_groups)).astype(np.int32)
            num_rows = int(sizes.sum()) + spare
            tiles = np.asarray(row_tiles(sizes, num_rows, tile))
            owner = np.repeat(np.arange(num_groups + 1), [*sizes, spare])
            seen = np.zeros(num_rows, int)
            for group, start, end in tiles:
                assert end - start <= tile
                assert (owner[start:end] == group).all()
                seen[start:end] += 1
            assert (seen == 1).all()
            assert len(tiles) <= num_rows // tile + num_groups + 1  # never E times the work


def test_kernels_of_experts_without_rows_are_never_read():
    kernel = jnp.full((6, 16, 16), jnp.nan).at[2].set(1.0)
    sizes = jnp.zeros(6, jnp.int32).at[2].set(3)
    assert jnp.isfinite(grouped_triton.grouped_rows(jnp.ones((9, 16)), kernel, sizes, interpret=True)).all()


def triton_modules(lowered):
    """What the program hands to Triton."""
    modules = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == "__gpu$xla.gpu.triton":
            modules.append(op.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return modules


def no_gpu_at_hand():
    """Names the GPU to lower for: without one, Pallas wants to know since JAX 0.11."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=device))


@pytest.mark.parametrize("groups", [[3000, 0, 1096], [700, 0, 90]], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_programs_pass_tritons_verifier(dtype, groups):
    """Interpreting sees no index of the wrong type, and no tile of no power of two; this needs no GPU and no compiler for one."""
    x, kernel, gradient = operands(groups, 96, 160, dtype, spare=0)
    sizes = jnp.asarray(groups, jnp.int32)
    for function, args in (
        (grouped_triton.grouped_rows, (x, kernel, sizes)),
        (functools.partial(grouped_triton.grouped_rows, transpose=True), (gradient, kernel, sizes)),
        (grouped_triton.grouped_gradients, (x, gradient, sizes)),
    ):
        with no_gpu_at_hand():
            (module,) = triton_modules(jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)))
        context = mlir.make_ir_context()
        dialect.register_dialect(context)
        with context, ir.Location.unknown():
            parsed = ir.Module.parse(module)  # verifies, and raises what it finds
        assert str(parsed).count("tt.dot") == 1
