"""What rounding costs a model that has learned something: its loss on sources that it has not seen, and its choices of tokens."""

import jax
import numpy as np
import pytest

import flax_switch as fs

CONFIG = fs.SwitchConfig(
    vocab_size=96, d_model=64, num_heads=4, d_kv=16, d_ff=128, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, init_scale=1.0, dropout_rate=0.0, copying_heads=2,
)  # fmt: skip
EOS = 1


def batch(rng, rows):
    """Sources of random words, and targets that mostly follow a chain of tokens which the words of the source begin."""
    sources, targets = np.zeros((rows, 9), np.int32), np.full((rows, 9), -100, np.int32)
    for source, target in zip(sources, targets, strict=True):
        words = rng.integers(3, 96, rng.integers(3, 9))
        follow = np.where(rng.random(len(words)) < 0.15, rng.integers(3, 96, len(words)), 3 + (5 * words + 1) % 93)
        source[: len(words) + 1], target[: len(words) + 1] = [*words, EOS], [*follow, EOS]
    return {"input_ids": sources, "labels": targets}


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    optimizer = fs.optimizer(CONFIG, 400, name="muon", learning_rate=0.05, schedule="linear", warmup_steps=50, b2=0.98)
    state = fs.TrainState.create(fs.init_params(CONFIG, jax.random.key(0)), optimizer)
    for _ in range(400):
        state, _ = fs.train_step(CONFIG, optimizer, state, batch(rng, 32))
    return fs.Pretrained(CONFIG, fs.SwitchTransformer(CONFIG), state.params)


def calls(rows):
    """What a model is called with, as `batch` draws it."""
    rng = np.random.default_rng(5)
    for examples in (batch(rng, 32) for _ in range(rows // 32)):
        mask, labels = examples["input_ids"] != 0, examples["labels"]
        yield dict(input_ids=examples["input_ids"], attention_mask=mask, labels=labels, decoder_attention_mask=labels >= 0)


def heldout(pretrained):
    """Cross-entropy in nats a token, and the likeliest token at every place, under the true prefix."""
    examples = batch(np.random.default_rng(99), 256)
    mask, labels = examples["input_ids"] != 0, examples["labels"]
    logits = np.float64(pretrained(examples["input_ids"], mask, labels=labels, decoder_attention_mask=labels >= 0).logits)
    counted = labels >= 0
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[counted].mean(), logits.argmax(-1)[counted]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "worse", "alike"), [("int8", 0.002, 0.99), ("int4", 0.04, 0.94), ("bfloat16", 0.001, 0.995)])
def test_a_trained_models_loss_and_tokens_hardly_change(trained, weights, worse, alike):
    (loss, tokens), (rounded_loss, rounded_tokens) = heldout(trained), heldout(fs.quantize(trained, weights))
    assert loss < 0.5 * np.log(93), "the model has learned nothing that rounding could cost"
    print(f"\n{weights}: {loss:.4f} nats, {rounded_loss / loss - 1:+.4%}, argmax alike {np.mean(tokens == rounded_tokens):.4f}")
    assert rounded_loss <= loss * (1 + worse)
    assert np.mean(tokens == rounded_tokens) >= alike


@pytest.mark.slow
def test_four_bits_that_are_rounded_for_what_a_model_is_given_lose_a_fraction(trained):
    loss, tokens = heldout(trained)
    plain, _ = heldout(fs.quantize(trained, "int4"))
    rounded, alike = heldout(fs.quantize(trained, "int4", calibration=list(calls(512))))
    print(f"\nint4 {plain / loss - 1:+.4%}, calibrated {rounded / loss - 1:+.4%}, argmax alike {np.mean(tokens == alike):.4f}")
    assert rounded - loss <= 0.5 * (plain - loss) and rounded <= loss * 1.02
    assert np.mean(tokens == alike) >= 0.97
