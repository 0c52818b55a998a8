"""The kernels for GPUs: interpreted, against one product for each group; and what Triton is given, by its own verifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from flax_switch.ops import grouped_gpu

GROUPS = {
    "around tile sizes": [0, 1, 63, 64, 65, 255],
    "all to one": [0, 0, 300, 0],
    "none": [0, 0, 0],
    "one expert": [17],
    "many tiles": [700, 3, 0, 650],
}


def operands(sizes, inputs, outputs, dtype, spare=5):
    """Rows, kernels, a cotangent and group sizes; some rows belong to no group."""
    rng = np.random.default_rng(len(sizes))
    shapes = (sum(sizes) + spare, inputs), (len(sizes), inputs, outputs), (sum(sizes) + spare, outputs)
    return *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), jnp.asarray(sizes, jnp.int32)


def relative_error(got, want):
    return np.linalg.norm(np.float64(got) - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (200, 300)])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_every_group_has_its_own_products(sizes, inputs, outputs, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    x, kernel, gradient, group_sizes = operands(sizes, inputs, outputs, dtype)
    product = grouped_gpu.grouped_rows(x, kernel, group_sizes, interpret=True)
    back = grouped_gpu.grouped_rows(gradient, kernel, group_sizes, transpose=True, interpret=True)
    kernels = grouped_gpu.grouped_kernels(x, gradient, group_sizes, interpret=True)
    assert product.dtype == back.dtype == kernels.dtype == dtype
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows, matrix, cotangent = np.float64(x[start:end]), np.float64(kernel[e]), np.float64(gradient[start:end])
        assert relative_error(product[start:end], rows @ matrix) < tolerance, e
        assert relative_error(back[start:end], cotangent @ matrix.T) < tolerance, e
        assert relative_error(kernels[e], rows.T @ cotangent) < tolerance, e
    np.testing.assert_array_equal(product[ends[-1] :], 0)
    np.testing.assert_array_equal(back[ends[-1] :], 0)


def test_tiles_take_every_row_once_and_no_tile_two_groups():
    rng = np.random.default_rng(0)
    row_tiles = jax.jit(grouped_gpu.row_tiles, static_argnums=(1, 2))
    for num_groups, tile in ((1, 16), (5, 16), (64, 128), (7, 64)):
        for share in (0.0, 0.3, 1.0):
            sizes = rng.multinomial(rng.integers(0, 900), rng.dirichlet([0.2] * num_groups)).astype(np.int32)
            num_rows = int(sizes.sum() / max(share, 0.3)) + 1
            tiles = np.asarray(row_tiles(sizes, num_rows, tile))
            owner = np.repeat(np.arange(num_groups + 1), [*sizes, num_rows - sizes.sum()])
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
    assert jnp.isfinite(grouped_gpu.grouped_rows(jnp.ones((9, 16)), kernel, sizes, interpret=True)).all()


def triton_modules(lowered):
    """What the program hands to Triton."""
    modules = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == "__gpu$xla.gpu.triton":
            modules.append(op.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return modules


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_programs_pass_tritons_verifier(dtype):
    """Interpreting does not see an index of the wrong type; this needs no GPU and no compiler for one."""
    x, kernel, gradient, sizes = operands([3000, 0, 1096], 96, 160, dtype, spare=0)
    for function, args in (
        (grouped_gpu.grouped_rows, (x, kernel, sizes)),
        (functools.partial(grouped_gpu.grouped_rows, transpose=True), (gradient, kernel, sizes)),
        (grouped_gpu.grouped_kernels, (x, gradient, sizes)),
    ):
        (module,) = triton_modules(jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)))
        context = mlir.make_ir_context()
        dialect.register_dialect(context)
        with context, ir.Location.unknown():
            parsed = ir.Module.parse(module)  # verifies, and raises what it finds
        assert str(parsed).count('"tt.dot"(') + str(parsed).count("tt.dot %") == 1
