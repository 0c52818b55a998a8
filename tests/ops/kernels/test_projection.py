"""A projection's gradients are those of `x @ kernel`, whatever form a CPU is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_switch.ops.kernels.projection import kernel_gradient, project


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_gradients_are_those_of_the_plain_product(lead, width, features, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*lead, width), dtype)
    kernel = jax.random.normal(keys[1], (width, features), dtype)
    weights = jax.random.normal(keys[2], (*lead, features), dtype)

    def value_and_gradients(product):
        return jax.jit(jax.value_and_grad(lambda x, kernel: (product(x, kernel) * weights).sum(), argnums=(0, 1)))(x, kernel)

    tolerance = 1e-5 if dtype == "float32" else 0.05
    for ours, plain in zip(*map(jax.tree.leaves, map(value_and_gradients, (project, jnp.matmul))), strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(ours.astype("float32"), plain.astype("float32"), rtol=tolerance, atol=tolerance * 10)


def test_projections_are_mapped_like_any_function():
    x, kernels = jax.random.normal(jax.random.key(0), (7, 4)), jnp.ones((3, 4, 5))
    mapped = jax.vmap(jax.grad(lambda kernel: project(x, kernel).sum()))(kernels)
    np.testing.assert_allclose(mapped, np.broadcast_to(x.sum(0)[:, None], (3, 4, 5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "features"), [(4, 9), (9, 4)])
def test_a_kernels_gradient_adds_up_in_the_dtype_that_is_asked_for(width, features):
    x, gradient = (jnp.ones((1024, n), "bfloat16") for n in (width, features))  # bfloat16 holds no odd number above 256
    x = x.at[0].set(2)
    total = kernel_gradient(x, gradient, jnp.float32)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, np.full((width, features), 1025))
