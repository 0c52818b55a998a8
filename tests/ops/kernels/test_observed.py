"""The rows that come by at a kernel: their second moments as a gradient, by every product and executor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import EXECUTORS
from flax_switch.convert.canonical import flatten, is_expert, is_kernel, unflatten
from flax_switch.nn.inputs import shift_right
from flax_switch.ops.kernels.grouped import batched_matmul, grouped_matmul
from flax_switch.ops.kernels.observed import Observed
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.kernels.quantized import multiply

RNG = np.random.default_rng(0)
SIZES = jnp.array([3, 0, 5])


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def gradients(product, x, kernel, weights):
    """What a loss with given gradients by the rows of the product says of the moments, x and the kernel."""

    def loss(zeros, x, kernel):
        return (product(x, Observed(kernel, zeros)) * weights).sum()

    return jax.grad(loss, (0, 1, 2))(jnp.zeros((*kernel.shape[:-1], kernel.shape[-2])), x, kernel)


def moments(x, weights):
    """The sum over rows of |g|^2 x^T x."""
    x, weights = np.float64(x).reshape(-1, x.shape[-1]), np.float64(weights).reshape(-1, weights.shape[-1])
    return (x.T * np.square(weights).sum(-1)) @ x


@pytest.mark.parametrize("product", [project, multiply])
def test_the_moments_of_rows_are_weighted_by_the_loss_and_nothing_else_changes(product):
    x, kernel, weights = drawn(2, 5, 6), drawn(6, 3), drawn(2, 5, 3)
    weights = weights.at[:, 3:].set(0)  # rows that the loss does not see
    found, of_x, of_kernel = gradients(product, x, kernel, weights)
    np.testing.assert_allclose(found, moments(x[:, :3], weights[:, :3]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(product(x, Observed(kernel, jnp.zeros((6, 6)))), product(x, kernel))
    want = jax.grad(lambda x, kernel: (product(x, kernel) * weights).sum(), (0, 1))(x, kernel)
    np.testing.assert_allclose(of_x, want[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_kernel, want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_expert_has_the_moments_of_its_own_rows(dtype):
    x, kernel, weights = drawn(9, 6).astype(dtype), drawn(3, 6, 4).astype(dtype), drawn(9, 4)  # the last row is no expert's
    found, *_ = gradients(lambda x, kernel: grouped_matmul(x, kernel, SIZES).astype(jnp.float32), x, kernel, weights)
    held = np.float64(weights.astype(dtype))
    assert found.dtype == jnp.float32 and not found[1].any()
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 8))):
        np.testing.assert_allclose(found[expert], moments(np.float64(x)[rows], held[rows]), rtol=1e-5, atol=1e-5)

    buffers, weights = drawn(2, 3, 4, 6), drawn(2, 3, 4, 5).at[:, :, 2:].set(0)  # slots 2 and 3 are empty
    found, *_ = gradients(batched_matmul, buffers, drawn(3, 6, 5), weights)
    for expert in range(3):
        np.testing.assert_allclose(found[expert], moments(buffers[:, expert], weights[:, expert]), rtol=1e-5, atol=1e-5)


CONFIG = fs.SwitchConfig(
    vocab_size=64, d_model=32, num_heads=2, d_kv=16, d_ff=48, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, init_scale=1.0, capacity_mode="dropless",
    num_selected_experts=2, mlp_activations=("gelu_new", "linear"), shared_expert=True,
)  # fmt: skip


def observed_model(config, source, labels, mask):
    """The moments at every kernel of a model, and the gradients of all its parameters."""
    kernels = flatten(fs.init_params(config, jax.random.key(0)))
    paths = [path for path in kernels if is_kernel(path)]

    def loss(zeros, kernels):
        params = {**kernels, **{path: Observed(kernels[path], zero) for path, zero in zeros.items()}}
        logits = fs.SwitchTransformer(config).apply(
            {"params": unflatten(params)}, source, shift_right(labels, config), mask
        ).logits  # fmt: skip
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()

    zeros = {path: jnp.zeros((*kernels[path].shape[:-1], kernels[path].shape[-2])) for path in paths}
    return jax.jit(jax.grad(loss, (0, 1)))(zeros, kernels)


@pytest.mark.slow
def test_every_executor_sees_the_same_rows_and_padding_is_none_of_them():
    source, labels = RNG.integers(3, 64, (3, 8)), RNG.integers(3, 64, (3, 7))
    mask = np.ones((3, 8), np.int32)
    mask[:, 6:] = 0
    want, by_kernel = observed_model(CONFIG, source, jnp.asarray(labels), mask)
    others = source.copy()
    others[:, 6:] = RNG.integers(3, 64, (3, 2))
    for executor in EXECUTORS:
        if executor == "auto":
            continue
        capacity = {} if executor in ("ragged", "blocks") else dict(capacity_mode="factor", eval_capacity_factor=8.0)
        config = CONFIG.replace(moe_executor=executor, **capacity)
        found, _ = observed_model(config, others, jnp.asarray(labels), mask)
        for path, moments in want.items():
            scale = np.abs(moments).max()
            assert scale > 0, path
            np.testing.assert_allclose(found[path] / scale, moments / scale, atol=2e-5, err_msg=f"{executor}, {path}")
    # By Cauchy and Schwarz no gradient of a kernel, a sum of g^T x over T rows, is larger than this allows.
    rows = dict.fromkeys(want, source.size * 2 + labels.size * 2)
    for path, moments in want.items():
        trace = np.trace(moments, axis1=-2, axis2=-1)
        norm = np.square(by_kernel[path]).sum((-2, -1))
        assert (norm <= rows[path] * trace * (1 + 1e-4)).all(), path
        assert is_expert(path) == (moments.ndim == 3)
