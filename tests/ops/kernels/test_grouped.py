"""Grouped products against one product for each group, at sizes around every block boundary."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_oracle import GROUPS, assert_products, operands, relative_error

from flax_switch.ops.kernels import grouped, grouped_blocks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_values_and_gradients_equal_a_loop_expert_by_expert(sizes, dtype):
    x, kernel, cotangent = operands(sizes, 24, 40, dtype)
    product, transpose = jax.jit(lambda *args: jax.vjp(grouped.grouped_matmul, *args))(x, kernel, jnp.asarray(sizes, jnp.int32))
    dx, dkernel, _ = transpose(cotangent)
    assert_products(sizes, x, kernel, cotangent, product, dx, dkernel)


def test_a_kernel_gradient_of_many_blocks_is_added_up_in_float32():
    rows = jnp.ones((4096, 8), jnp.bfloat16)
    sizes = jnp.zeros(64, jnp.int32).at[3].set(4096)
    gradient = jax.jit(grouped_blocks.block_gradients)(rows, rows, sizes)
    np.testing.assert_array_equal(gradient[3], 4096)  # bfloat16 sums of ones would stop growing at 256


@pytest.mark.parametrize(
    "sizes",  # of a router that has learned nothing yet: a model with 8 experts on 1,024 and on 256 tokens
    [
        [0, 3, 6, 9, 38, 179, 252, 256],
        [16, 17, 56, 108, 147, 170, 172, 256],
        [0, 0, 0, 0, 0, 0, 6, 250],
        [0, 0, 0, 0, 1, 41, 61, 153],
    ],
)
@pytest.mark.parametrize("cut", [True, False])
def test_uneven_groups_take_one_block_each_and_little_padding(sizes, cut):
    num_rows = 1024 if sum(sizes) > 256 else 256
    blocks = list(grouped_blocks.row_blocks(jnp.asarray(sizes), num_rows, cut=cut))
    assert sum(int(b.num_blocks) for b in blocks) == np.count_nonzero(sizes)
    assert sum(b.size * int(b.num_blocks) for b in blocks) <= 1.25 * sum(sizes) + 32


@pytest.mark.parametrize(("num_rows", "experts"), [(4096, 64), (4096, 8), (1024, 8)])
@pytest.mark.parametrize("cut", [True, False])
def test_balanced_groups_take_little_padding(num_rows, experts, cut):
    sizes = np.random.default_rng(0).multinomial(num_rows, np.full(experts, 1 / experts))
    blocks = grouped_blocks.row_blocks(jnp.asarray(sizes), num_rows, cut=cut)
    assert sum(b.size * int(b.num_blocks) for b in blocks) <= 1.25 * num_rows


def test_kernels_of_experts_without_rows_are_never_read():
    kernel = jnp.full((6, 8, 8), jnp.nan).at[2].set(1.0)
    sizes = jnp.zeros(6, jnp.int32).at[2].set(3)
    assert jnp.isfinite(jax.jit(grouped.grouped_matmul)(jnp.ones((3, 8)), kernel, sizes)).all()


def test_the_tpus_products_state_the_same_mathematics():
    """Here XLA expands `lax.ragged_dot` to a dense product, and Pallas interprets its kernel."""
    sizes = GROUPS["around block sizes"]
    rng = np.random.default_rng(1)
    x, kernel, gradient = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((450, 8), (len(sizes), 8, 12), (450, 12)))
    group_sizes = jnp.asarray(sizes, jnp.int32)
    for transpose, rows in ((False, x), (True, gradient)):
        products = [f(rows, kernel, group_sizes, transpose=transpose) for f in (grouped._ragged_rows, grouped_blocks.block_rows)]
        np.testing.assert_allclose(*products, atol=1e-5)
    want = jax.jit(grouped_blocks.block_gradients)(x, gradient, group_sizes)
    got = grouped._megablox_gradient(x, gradient, group_sizes, interpret=True)
    for e in range(len(sizes)):
        assert relative_error(got[e], np.float64(want[e])) < 1e-5, e


@pytest.mark.parametrize("groups", [0, 1, 2])  # no group: a batch without rows
def test_equal_buffers_have_the_batched_products_values_and_gradients(groups):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(groups, 7, 3, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(7, 4, 5)), jnp.float32)
    plain = functools.partial(jnp.einsum, "GECD,EDF->GECF")
    loss = lambda product, x, kernel: (product(x, kernel) ** 3).sum()  # noqa: E731
    results = [
        (product(x, kernel), *jax.grad(functools.partial(loss, product), argnums=(0, 1))(x, kernel))
        for product in (jax.jit(grouped.batched_matmul), plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


@pytest.mark.parametrize(("rows", "tile"), [(200, 128), (256, 128), (257, 512), (2000, 512)])
def test_a_tpus_tiles_are_as_tall_as_the_rows_of_a_mean_group_are_many(rows, tile, monkeypatch):
    """Whatever the widths are; and rows are added up to whole tiles, zeros that belong to no group."""
    seen = []
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    record = lambda x, gradient, sizes, dtype, tiles, **_: seen.append((x.shape, gradient.shape, tiles)) or x  # noqa: E731
    monkeypatch.setattr(megablox, "tgmm", record)
    grouped._megablox_gradient(jnp.ones((rows, 1024)), jnp.ones((rows, 40)), jnp.array([rows // 2, rows - rows // 2]))
    padded = -(-rows // tile) * tile
    assert seen == [((1024, padded), (padded, 40), (tile, 512, 40))]
