"""Kernels of 16 bits: widened late, the same bits in a third of the memory; for few rows in bfloat16, not widened at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config.generation import make_controls, split_numbers
from flax_switch.generation.program import run_program
from flax_switch.ops.kernels.few_rows import unstacked_experts
from flax_switch.ops.kernels.narrow import FEW_ROWS, MOST_DECODED, MOST_MULTIPLIED, Narrow, multiply_few_rows, thirds
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.moe.routing import router_logits

SIZE, LAYERS = 64, 6


def kernels(dtype):
    return [jnp.asarray(np.random.default_rng(i).normal(size=(SIZE, SIZE)) / 8, dtype) for i in range(LAYERS)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
@pytest.mark.parametrize("first", [1.0, np.nan, np.inf])
def test_a_product_has_the_bits_of_the_kernel_widened_at_once(dtype, computed, first):
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 5, SIZE)), computed).at[0, 0, 0].set(first)
    kernel = kernels(dtype)[0]
    want, got = (jax.jit(project)(x, k) for k in (kernel.astype(computed), Narrow(kernel)))
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    np.testing.assert_array_equal(*(jax.jit(router_logits)(x, k) for k in (kernel, Narrow(kernel))))


def test_a_loop_over_layers_holds_one_widened_kernel_at_a_time():
    def run(x, layers):
        def step(x):
            for kernel in layers:
                x = jnp.tanh(project(x, kernel.astype(x.dtype)))
            return x

        return jax.lax.while_loop(lambda x: x[0, 0] < 0.5, step, x)

    x, widened = jnp.zeros((1, SIZE)), SIZE * SIZE * 4
    plain = kernels("bfloat16")
    early, late = (
        jax.jit(run).lower(x, layers).compile().memory_analysis().temp_size_in_bytes
        for layers in (plain, [Narrow(kernel) for kernel in plain])
    )
    assert early > LAYERS * widened > 3 * widened > late


def test_a_number_is_the_sum_of_its_parts_to_the_bit():
    rng = np.random.default_rng(0)
    exponents = rng.integers(-100, 127, 5000)
    x = np.ldexp(rng.uniform(-1, 1, 5000), exponents).astype(np.float32)
    x = np.concatenate([x, [0.0, -0.0, np.finfo(np.float32).max, -1.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    parts = [np.asarray(part, np.float64) for part in jax.jit(thirds)(x)]
    np.testing.assert_array_equal(sum(parts), x.astype(np.float64))
    assert np.abs(parts[2][:5000]).max() > 0 and all(part.dtype == jnp.bfloat16 for part in thirds(jnp.ones(3)))


@pytest.mark.parametrize("implementation", FEW_ROWS)
@pytest.mark.parametrize("rows", [(1,), (2, 1), (MOST_MULTIPLIED,)])
def test_few_rows_have_products_as_near_the_exact_ones_as_those_of_float32(implementation, rows):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(*rows, 300)).astype(np.float32), jnp.asarray(rng.normal(size=(300, 70)), jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(kernel, np.float64)
    made = multiply_few_rows(jnp.asarray(x), kernel, implementation=implementation)
    assert made.shape == (*rows, 70) and made.dtype == jnp.float32
    # Products of rows rounded to bfloat16 are off by 1e-1, of two parts of three by 1e-3.
    np.testing.assert_allclose(made, exact, atol=4e-5)


@pytest.mark.parametrize("few", [True, False])
def test_more_rows_or_another_dtype_are_multiplied_with_the_kernel_widened(few):
    rng = np.random.default_rng(2)
    kernel = kernels("bfloat16")[0]
    for dtype, rows in (("float32", MOST_MULTIPLIED + 1), ("bfloat16", 1)):
        x = jnp.asarray(rng.normal(size=(rows, SIZE)), dtype)
        want, got = (jax.jit(project)(x, k) for k in (kernel.astype(dtype), Narrow(kernel, few)))
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def decoding(rows):
    """The compiled program of generating from a model in bfloat16, and how many weights its decoder has, nearly all in MLPs."""
    config = fs.SwitchConfig(
        vocab_size=64, d_model=512, num_heads=1, d_kv=8, d_ff=1024, num_encoder_layers=1, num_decoder_layers=2,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=1, num_experts=4, param_dtype="bfloat16",
    )  # fmt: skip
    params = fs.init_params(config, jax.random.key(0))
    variables = {"params": params, "unstacked": unstacked_experts(params, config.decoder.sparse_layers, 4)}
    controls, numbers = split_numbers(make_controls(dict(max_new_tokens=8), config))
    ids = np.full((rows, 5), 7)
    inputs = (variables, ids, np.ones_like(ids, bool), np.zeros((rows, 1), int), np.zeros((rows, 2), np.uint32), numbers)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    return run_program.lower(config, controls, *inputs).compile(), weights


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about products on a CPU")
def test_a_decoder_of_few_rows_holds_none_of_its_kernels_in_float32():
    few, weights = decoding(1)
    many, _ = decoding(MOST_DECODED + 1)
    few, many = (program.memory_analysis().temp_size_in_bytes for program in (few, many))
    assert many > 4 * weights > 3 * few
