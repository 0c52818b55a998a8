"""Where a bfloat16 model computes in float32: norms, softmax, heads and cross-entropy, each against float64 of the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.layers import Embedding, RMSNorm
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.attention import dot_product_attention
from flax_switch.ops.losses import token_cross_entropy

CONFIG = SwitchConfig(
    vocab_size=64, d_model=32, num_heads=2, d_kv=16, d_ff=32, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, dropout_rate=0.0, init_scale=1.0, dtype="bfloat16",
)  # fmt: skip
RNG = np.random.default_rng(0)


def narrow(*shape):
    """Numbers that bfloat16 holds."""
    return jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)


def wide(x):
    return np.asarray(x, np.float64)


def test_a_norm_rounds_once_at_its_end():
    x, scale = narrow(50, 32), jnp.asarray(RNG.normal(size=32), jnp.float32)
    y = jax.jit(lambda x: RMSNorm(CONFIG).apply({"params": {"scale": scale}}, x))(x)
    want = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(scale)
    assert y.dtype == jnp.bfloat16
    assert (np.asarray(y) == np.asarray(jnp.asarray(want, jnp.bfloat16))).mean() > 0.99  # but where float32 met a tie


def test_attentions_probabilities_are_float32_whatever_the_activations_are():
    query, key, value = narrow(2, 9, 2, 16), narrow(2, 9, 2, 16), narrow(2, 9, 2, 16)
    bias = jnp.asarray(RNG.normal(size=(1, 2, 9, 9)), jnp.float32)
    output, probs = jax.jit(lambda *x: dot_product_attention(*x, bias=bias))(query, key, value)
    logits = np.einsum("BQHK,BTHK->BHQT", wide(query), wide(key)) + wide(bias)
    want = np.exp(logits - logits.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    assert probs.dtype == jnp.float32 and output.dtype == jnp.bfloat16
    np.testing.assert_allclose(probs, want, rtol=2e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_of_bfloat16_logits_is_float32s(smoothing):
    logits, targets = 3 * narrow(2, 5, 700), jnp.asarray(RNG.integers(0, 700, (2, 5)))
    got, z = jax.jit(lambda x: token_cross_entropy(x, targets, z_loss=0.5, label_smoothing=smoothing))(logits)
    log_z = np.log(np.exp(wide(logits)).sum(-1))
    log_probs = wide(logits) - log_z[..., None]
    target = np.full((2, 5, 700), smoothing / 699)
    np.put_along_axis(target, np.asarray(targets)[..., None], 1 - smoothing, -1)
    entropy = -(target * np.log(np.maximum(target, 1e-300))).sum(-1)
    np.testing.assert_allclose(got, -(target * log_probs).sum(-1) - entropy, rtol=1e-5)
    np.testing.assert_allclose(z, 0.5 * log_z**2, rtol=1e-5)
    assert got.dtype == z.dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_multiplies_in_float32(tied):
    config = CONFIG.replace(tie_word_embeddings=tied)
    model = SwitchTransformer(config)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    ids = jnp.asarray(RNG.integers(2, 64, (2, 4)))
    output = jax.jit(lambda p: model.apply({"params": p}, ids, ids))(params)
    hidden = wide(output.decoder_last_hidden_state)
    kernel = wide(params["token_embedder"]["embedding"]).T * 32**-0.5 if tied else wide(params["decoder"]["logits_dense"]["kernel"])
    np.testing.assert_allclose(output.logits, hidden @ kernel, rtol=1e-4, atol=1e-5)
    assert output.decoder_last_hidden_state.dtype == jnp.bfloat16


def test_embeddings_are_looked_up_in_the_activations_dtype():
    table = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
    y = Embedding(CONFIG).apply({"params": {"embedding": table}}, jnp.asarray([[3, 5]]))
    np.testing.assert_array_equal(y[0], table[jnp.asarray([3, 5])].astype(jnp.bfloat16))
