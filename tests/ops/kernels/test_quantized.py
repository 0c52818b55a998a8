"""Quantised kernels: what their integers mean, retold in numpy, and how far rounding the rows, too, can lead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_kernels import draw_int4, draw_int8

from flax_switch.ops.kernels import quantized
from flax_switch.ops.kernels.quantized import INT4, INT8, multiply_quantized


def meaning(kernel):
    """The weights, one by one."""
    values, scale = np.asarray(kernel.values), np.asarray(kernel.scale, np.float64)
    weights = np.empty(kernel.shape)
    for *lead, d, f in np.ndindex(*kernel.shape):
        group, place = divmod(d, 64)
        if kernel.packed:
            byte = int(values[(*lead, f, group, place % 32)])
            number, factor = (byte >> 4 if place >= 32 else byte & 15) - 8, scale[(*lead, f, group, 0)]
        else:
            number, factor = int(values[(*lead, f, d)]), scale[(*lead, f, 0)]
        weights[(*lead, d, f)] = number * factor
    return weights


@pytest.mark.parametrize("draw", [draw_int8, draw_int4])
def test_the_reference_multiplies_what_the_integers_mean(draw):
    rng = np.random.default_rng(0)
    kernel, x = draw(rng, 128, 24), rng.normal(size=(5, 128)).astype(np.float32)
    got = multiply_quantized(jnp.asarray(x), kernel, implementation="reference")
    np.testing.assert_allclose(got, np.float64(x) @ meaning(kernel), rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.floats(-6, 6), st.integers(0, 2**31))
def test_rounded_rows_are_the_integers_that_numpy_says(rows, inputs, outputs, size, seed):
    rng = np.random.default_rng(seed)
    kernel = draw_int8(rng, inputs, outputs)
    x = (rng.standard_t(3, size=(rows, inputs)) * 10**size).astype(np.float32)
    x[0] = 0  # a row without a largest number
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    whole = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)).astype(np.int64)
    want = (whole @ np.int64(kernel.values).T).astype(np.float32) * scale * np.asarray(kernel.scale).T
    got = jax.jit(lambda x, kernel: multiply_quantized(x, kernel, implementation="rounded_rows"))(x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    bound = np.abs(x).max(1, keepdims=True) / 254 * np.abs(meaning(kernel)).sum(0)
    assert (np.abs(got - np.float64(x) @ meaning(kernel)) <= bound * 1.001 + 1e-30).all()


@pytest.mark.parametrize("implementation", INT8)
def test_a_row_comes_out_the_same_whatever_its_neighbours_are(implementation):
    rng = np.random.default_rng(1)
    kernel = draw_int8(rng, 96, 40)
    x = jnp.asarray(rng.normal(size=(11, 96)), jnp.float32).at[3].mul(1e4)
    together = multiply_quantized(x, kernel, implementation=implementation)
    for rows in (slice(0, 1), slice(2, 5), slice(0, 11)):
        alone = multiply_quantized(x[rows], kernel, implementation=implementation)
        np.testing.assert_allclose(alone, together[rows], rtol=1e-6, atol=0 if implementation == "rounded_rows" else 1e-5)


@pytest.mark.parametrize("draw", [draw_int8, draw_int4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_have_their_rows_dtype_and_any_number_of_axes(draw, dtype):
    rng = np.random.default_rng(2)
    kernel, stack = draw(rng, 64, 16), draw(rng, 3, 64, 16)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 64)), dtype)
    for implementation in INT4 if kernel.packed else INT8:
        got = multiply_quantized(x, kernel, implementation=implementation)
        assert got.shape == (2, 3, 5, 16) and got.dtype == dtype
        one = multiply_quantized(x[0, 1], stack[1], implementation=implementation)
        np.testing.assert_allclose(
            multiply_quantized(x[0], stack, implementation=implementation)[1].astype("float32"),
            one.astype("float32"),
            rtol=1e-2,
            atol=1e-2,
        )


def test_only_accelerators_are_given_floats_to_multiply_for_int8():
    kernel = draw_int8(np.random.default_rng(0), 8, 8)
    text = {
        platform: str(jax.jit(quantized.multiply).trace(jnp.ones((4, 8)), kernel).lower(lowering_platforms=(platform,)).as_text())
        for platform in ("cpu", "tpu")
    }
    assert "(tensor<4x8xi8>, tensor<8x8xi8>) -> tensor<4x8xi32>" in text["cpu"]
    assert "i32>" not in "".join(line for line in text["tpu"].splitlines() if "dot_general" in line)
