"""Cross-entropy, z-loss, label smoothing and the normalisers against T5X's numbers."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.ops.losses import loss_weights, seq2seq_loss, token_cross_entropy

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "t5x_losses.npz")
NORMALIZERS = {
    "None": None,
    "233472.0": 233472.0,
    "NUM_REAL_TARGET_TOKENS": "real_target_tokens",
    "NUM_TOTAL_TARGET_TOKENS": "total_target_tokens",
    "AVERAGE_PER_SEQUENCE": "average_per_sequence",
}
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN if "/" in key})


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_t5x(case):
    name, smoothing, z_loss = case.removeprefix("lnf-").replace("_ls", "|").replace("_z", "|").split("|")
    targets, segments = jnp.asarray(GOLDEN["targets"]), jnp.asarray(GOLDEN["segment_ids"])
    normalizer = NORMALIZERS[name]

    def loss(logits):
        ce, z = token_cross_entropy(logits, targets, z_loss=float(z_loss), label_smoothing=float(smoothing))
        weights = (targets > 0).astype(np.float32) if isinstance(normalizer, str) else jnp.ones(targets.shape)
        weights, divisor = loss_weights(weights, normalizer, segments)
        return ((ce + z) * weights).sum() / divisor, ((z * weights).sum() / divisor, weights.sum())

    (value, (z, weight_sum)), grad = jax.value_and_grad(loss, has_aux=True)(GOLDEN["logits"])
    np.testing.assert_allclose(value, GOLDEN[f"{case}/loss"], rtol=1e-5)
    np.testing.assert_allclose(z, GOLDEN[f"{case}/z_loss"], rtol=1e-5)
    np.testing.assert_allclose(weight_sum, GOLDEN[f"{case}/weight_sum"], rtol=1e-5)
    if f"{case}/grad" in GOLDEN:
        np.testing.assert_allclose(grad, GOLDEN[f"{case}/grad"], rtol=1e-4, atol=1e-8)


def test_ignored_labels_do_not_count():
    config = SwitchConfig(vocab_size=17, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    labels = jnp.where(GOLDEN["targets"] > 0, GOLDEN["targets"], -100)
    output = SimpleNamespace(logits=jnp.asarray(GOLDEN["logits"]), encoder_router=(), decoder_router=())
    changed = SimpleNamespace(
        logits=jnp.where((labels == -100)[..., None], 3.0, output.logits), encoder_router=(), decoder_router=()
    )
    first, second = seq2seq_loss(output, labels, config), seq2seq_loss(changed, labels, config)
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-6)
    assert first.weight_sum == (labels != -100).sum()
    np.testing.assert_allclose(first.loss, first.cross_entropy + first.z_loss, rtol=1e-6)


def test_a_batch_without_targets_costs_nothing_and_has_finite_gradients():
    config = SwitchConfig(vocab_size=7, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)

    def loss(logits):
        output = SimpleNamespace(logits=logits, encoder_router=(), decoder_router=())
        return seq2seq_loss(output, jnp.full((2, 3), -100), config).loss

    value, grad = jax.value_and_grad(loss)(jnp.ones((2, 3, 7)))
    assert value == 0.0
    assert not grad.any()
