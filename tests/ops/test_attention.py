"""Attention against its formula: values, and the gradients that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.ops.attention import dot_product_attention
from flax_switch.ops.dropout import keep_mask
from flax_switch.ops.kernels.attention import MASKED

B, Q, T, H, K = 3, 5, 7, 2, 4


def plain(query, key, value, bias, mask, keep):
    """The formula, head by head and row by row."""
    rows = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[2]):
            logits = query[b, :, h] @ key[b, :, h].T
            if bias is not None:
                logits += bias[b % bias.shape[0], h % bias.shape[1]]
            if mask is not None:
                logits += jnp.where(mask[b % mask.shape[0], 0], 0.0, MASKED)
            weights = jax.nn.softmax(logits)
            heads.append((weights * (1.0 if keep is None else keep[b, h]), weights))
        rows.append(heads)
    output = jnp.stack([jnp.stack([w @ value[b, :, h] for h, (w, _) in enumerate(row)], 1) for b, row in enumerate(rows)])
    return output, jnp.stack([jnp.stack([probs for _, probs in row]) for row in rows])


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(B, Q, H, K), draw(B, T, H, K), draw(B, T, H, K), draw


@pytest.mark.parametrize(
    ("bias_shape", "masked", "of"),
    [
        (None, False, "output"),
        ((1, H), True, "output"),
        ((B, H), True, "both"),
        ((1, 1), False, "both"),
        ((B, 1), True, "probs"),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(arrays, bias_shape, masked, of):
    query, key, value, draw = arrays
    bias = None if bias_shape is None else draw(*bias_shape, Q, T)
    # The first row may attend to nothing at all, which must neither be NaN nor lose its gradient.
    mask = jnp.asarray(np.random.default_rng(1).random((B, 1, Q, T)) < 0.7).at[0, 0, 0].set(False) if masked else None
    weight = draw(B, Q, H, K), draw(B, H, Q, T)

    def loss(function, *arguments):
        output, probs = function(*arguments)
        return (output * weight[0]).sum() * (of != "probs") + (probs * weight[1]).sum() * (of != "output")

    ours = lambda q, k, v, b: loss(lambda *a: dot_product_attention(*a[:3], bias=a[3], mask=mask), q, k, v, b)  # noqa: E731
    theirs = lambda q, k, v, b: loss(lambda *a: plain(*a, mask, None), q, k, v, b)  # noqa: E731
    argnums = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    got = jax.jit(jax.value_and_grad(ours, argnums))(query, key, value, bias)
    want = jax.jit(jax.value_and_grad(theirs, argnums))(query, key, value, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)


def test_dropout_drops_a_key_for_all_queries_of_a_head_and_its_gradient_with_it(arrays):
    query, key, value, _ = arrays
    rate, rng = 0.4, jax.random.key(3)
    keep = keep_mask(rng, rate, (B, H, 1, T)) / (1 - rate)

    def ours(*args):
        return (dot_product_attention(*args, dropout_rate=rate, dropout_rng=rng)[0] ** 2).sum()

    got = jax.grad(ours, (0, 1, 2))(query, key, value)
    want = jax.grad(lambda *args: (plain(*args, None, None, keep)[0] ** 2).sum(), (0, 1, 2))(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)
    # A key that no head keeps for a row has no value's gradient.
    assert not np.asarray(got[2])[np.asarray(keep[:, :, 0] == 0).swapaxes(1, 2)].any()


def test_bfloat16_gradients_are_near_those_of_float32(arrays):
    query, key, value, draw = arrays
    bias = draw(1, H, Q, T)

    def grads(dtype):
        loss = lambda q, k, v, b: (dot_product_attention(q, k, v, bias=b)[0].astype(jnp.float32) ** 2).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2, 3))(*(x.astype(dtype) for x in (query, key, value)), bias)

    for a, b in zip(grads(jnp.bfloat16), grads(jnp.float32), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max()))
