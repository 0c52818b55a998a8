"""Experts that a program calls out for: the bits of those in memory, each asked for once and in order, however many rows hit it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.host.expert_cache import ExpertCache
from flax_switch.ops.kernels.few_rows import few_rows
from flax_switch.ops.kernels.grouped import batched_matmul, grouped_matmul
from flax_switch.ops.kernels.on_disk import OnDisk, run_reading
from flax_switch.ops.mlp import mlp
from flax_switch.ops.moe import fetched

E, D, F = 6, 48, 80


def experts(dtype=np.float32, d=D, f=F):
    """Kernels of experts, and the same as a cache gives them out, with what it was asked for."""
    rng = np.random.default_rng(0)
    kernels = {"wi": rng.normal(size=(E, d, f)).astype(dtype), "wo": rng.normal(size=(E, f, d)).astype(dtype)}
    asked = []

    def read(layer, expert):
        asked.append(expert)
        return {f"{name}/kernel": kernel[expert] for name, kernel in kernels.items()}, 0

    parts = {"layer": {f"{name}/kernel": (kernel.shape, kernel.dtype) for name, kernel in kernels.items()}}
    one = sum(kernel[0].nbytes for kernel in kernels.values())
    return kernels, OnDisk(ExpertCache(parts, read, one), "layer", "wi/kernel"), asked


MLP = functools.partial(mlp, activations=("gelu_new",))


@pytest.mark.parametrize(
    "choices",
    [[[2]], [[3, 0]], [[i % 3] for i in range(40)], [[5]] * 17 + [[1]], [[i % 6, (i + 1) % 6] for i in range(23)]],
    ids=len,
)
def test_few_rows_have_the_bits_of_the_implementation_that_jumps(choices):
    kernels, on_disk, asked = experts()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(len(choices), D)), jnp.float32)
    expert = jnp.asarray(choices, jnp.int32)
    one_by_one = [{name: jnp.asarray(kernel[e]) for name, kernel in kernels.items()} for e in range(E)]
    run = functools.partial(few_rows, mlp=MLP, stacked=jax.tree.map(jnp.asarray, kernels), unstacked=one_by_one)
    got, _ = run_reading(on_disk, lambda: jax.jit(lambda x, e: fetched.few_rows(x, e, on_disk, MLP))(x, expert))
    np.testing.assert_array_equal(got, jax.jit(run)(x, expert))
    hit = sorted({e for row in choices for e in row})
    assert asked == hit if expert.size > 1 else asked == [expert[0, 0]]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [[0, 7, 0, 1, 0, 0], [300, 0, 2, 33, 64, 1], [0, 0, 0, 0, 0, 512], [5, 5, 5, 5, 5, 5]], ids=str)
def test_sorted_rows_have_the_bits_of_the_blocks(sizes, dtype):
    kernels, on_disk, asked = experts(dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(sum(sizes) + 3, D)), jnp.float32)
    groups = jnp.asarray(sizes, jnp.int32)
    product = functools.partial(grouped_matmul, group_sizes=groups, implementation="blocks")
    want = jax.jit(lambda x: MLP(x, jax.tree.map(jnp.asarray, kernels), matmul=product))(x)
    got, _ = run_reading(on_disk, lambda: jax.jit(lambda x: fetched.sorted_rows(x, groups, on_disk, MLP))(x))
    np.testing.assert_array_equal(got, want)
    assert asked == [e for e, size in enumerate(sizes) if size]


def test_buffers_have_the_bits_of_one_batched_product_and_are_zero_where_no_row_is():
    kernels, on_disk, asked = experts()
    x = np.random.default_rng(1).normal(size=(2, E, 5, D)).astype(np.float32)
    x[:, [0, 4]] = 0
    rows = jnp.asarray([0, 3, 1, 10, 0, 2], jnp.int32)
    want = jax.jit(lambda x: MLP(x, jax.tree.map(jnp.asarray, kernels), matmul=batched_matmul))(x)
    got, _ = run_reading(on_disk, lambda: jax.jit(lambda x: fetched.buffers(x, rows, on_disk, MLP))(x))
    np.testing.assert_array_equal(got, want)
    assert asked == [1, 2, 3, 5]


def test_large_experts_in_a_long_loop_do_not_lock_up():
    """Callbacks that convert large arguments can: theirs are small, and what they return is large."""
    kernels, on_disk, asked = experts(d=512, f=1024)
    expert = jnp.arange(E, dtype=jnp.int32)[:, None]

    def run(x):
        step = lambda i, x: jnp.tanh(fetched.few_rows(x, jnp.roll(expert, i, 0), on_disk, MLP)[:, 0])  # noqa: E731
        return jax.lax.fori_loop(0, 30, step, x)

    got, reads = run_reading(on_disk, lambda: jax.jit(run)(jnp.ones((E, 512))))
    assert np.isfinite(got).all() and reads.hits + reads.misses == 30 * E
