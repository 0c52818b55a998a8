"""Kernels of 16 bits that are widened late: the same bits, in a third of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.ops.kernels.narrow import Narrow
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
