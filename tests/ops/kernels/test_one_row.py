"""The product of a single row of integers: exact at every width, taken for a row alone, no kernel widened before a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quantized_kernels import draw_int8

from flax_switch.ops.kernels.loops import apart
from flax_switch.ops.kernels.one_row import LANES, fits, multiply_row
from flax_switch.ops.kernels.quantized import multiply_quantized


@pytest.mark.parametrize("parts", [1, 2, 7, 8, 11, 24, 31, 96])
def test_it_is_the_product_that_numpy_says_to_the_bit(parts):
    rng = np.random.default_rng(parts)
    row, values = (rng.integers(-127, 128, shape).astype(np.int8) for shape in (parts * LANES, (19, parts * LANES)))
    values[0], values[1] = 127, np.where(row < 0, -127, 127)  # sums as large as they get
    row[::3] = 127
    got = jax.jit(multiply_row)(jnp.asarray(row), jnp.asarray(values))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.int64(values) @ np.int64(row))


@pytest.mark.parametrize("width", [96, 100])
def test_a_row_alone_is_multiplied_as_among_others_to_the_bit(width):
    rng = np.random.default_rng(0)
    kernel, x = draw_int8(rng, width, 40), jnp.asarray(rng.normal(size=(5, width)), jnp.float32)
    product = jax.jit(lambda x: multiply_quantized(x, kernel, implementation="rounded_rows"))
    together = product(x)
    for shape in ((1, width), (1, 1, width)):
        alone = product(x[3].reshape(shape))
        assert alone.shape == (*shape[:-1], 40)
        np.testing.assert_array_equal(alone.reshape(-1), together[3])


def test_it_is_for_one_row_and_one_kernel_of_a_width_that_its_lanes_divide():
    row = jnp.zeros((1, 1, 64), jnp.int8)
    assert fits(row, jnp.zeros((8, 64), jnp.int8))
    assert not fits(jnp.zeros((2, 64), jnp.int8), jnp.zeros((8, 64), jnp.int8))
    assert not fits(row, jnp.zeros((3, 8, 64), jnp.int8))
    assert not fits(jnp.zeros((1, 48), jnp.int8), jnp.zeros((8, 48), jnp.int8))


def test_a_program_of_any_number_of_rows_takes_one():
    rng = np.random.default_rng(1)
    kernel, x = draw_int8(rng, 64, 16), jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    (rows,) = jax.export.symbolic_shape("rows")
    program = jax.export.export(jax.jit(lambda x: multiply_quantized(x, kernel, implementation="rounded_rows")))(
        jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    )
    np.testing.assert_array_equal(program.call(x[:1])[0], program.call(x)[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs' programs")
def test_a_row_is_rounded_once_not_for_every_output():
    kernel = draw_int8(np.random.default_rng(0), 512, 480)
    product = jax.jit(lambda x, kernel: multiply_quantized(jnp.tanh(x), kernel, implementation="rounded_rows"))
    compiled = product.lower(jnp.ones((1, 512)), kernel).compile().as_text()
    functions = [function for function in compiled.split("\n\n") if "s8[480,512]" in function and not function.startswith("ENTRY")]
    assert functions
    assert not [function for function in functions if "round-nearest" in function]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs' programs")
def test_a_loop_of_products_is_no_single_function_for_one_thread():
    kernel = draw_int8(np.random.default_rng(0), 512, 512)

    def loop(x, kernel, length):
        def step(carry):
            count, x = carry
            return apart(count + 1), jnp.tanh(multiply_quantized(x, kernel, implementation="rounded_rows"))

        return lax.while_loop(lambda carry: carry[0] < length, step, (jnp.int32(0), x))

    program = jax.jit(loop).lower(jnp.ones((1, 512)), kernel, jnp.int32(3)).compile()
    assert "small_call" not in program.as_text()
    assert program(jnp.ones((1, 512)), kernel, jnp.int32(3))[0] == 3


def test_a_loop_widens_no_kernel_before_it_begins():
    """As in decoding: the kernel is the same in every round, and XLA would have it as int32 once for all of them."""
    kernel = draw_int8(np.random.default_rng(0), 512, 512)

    def loop(x, kernel, rounds):
        return lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(multiply_quantized(x, kernel, implementation="rounded_rows")), x)

    compiled = jax.jit(loop).lower(jnp.ones((1, 512)), kernel, 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.values.size
