"""A small Hugging Face model, briefly trained so that its distributions are not flat, and the same weights as ours."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers

from flax_switch.pretrained import load_pretrained

VOCAB = 48
EOS = 1


def huggingface_model(**changes):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0, dropout_rate=0.0,
        router_jitter_noise=0.0,
    )  # fmt: skip
    config = transformers.SwitchTransformersConfig(**{**settings, **changes})
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def reversals(rng, batch):
    """Words, ended by EOS and padded, and the words backwards."""
    lengths = rng.integers(3, 9, batch)
    sources, targets = np.zeros((batch, 9), np.int64), np.full((batch, 9), -100, np.int64)
    for i, length in enumerate(lengths):
        word = rng.integers(3, VOCAB, length)
        sources[i, : length + 1] = [*word, EOS]
        targets[i, : length + 1] = [*word[::-1], EOS]
    return sources, targets


def train(model, steps=60):
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        sources, targets = map(torch.from_numpy, reversals(rng, 32))
        loss = model(input_ids=sources, attention_mask=(sources != 0).long(), labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def pair(model, folder):
    """The torch model and ours, loaded from what it saves."""
    model.save_pretrained(folder)
    ours = load_pretrained(folder)
    return SimpleNamespace(torch=model, model=ours.model, params=ours.params, config=ours.config)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A trained pair; Hugging Face's capacity of 64 drops nothing at these lengths."""
    return pair(train(huggingface_model()), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def scarce(tmp_path_factory):
    """A trained pair in which experts take at most three tokens of a sequence."""
    return pair(train(huggingface_model(expert_capacity=3), steps=20), tmp_path_factory.mktemp("scarce"))


@pytest.fixture(scope="session")
def sources():
    """Six sources of different lengths, padded on the right: ids and mask."""
    ids, _ = reversals(np.random.default_rng(7), 6)
    return ids.astype(np.int32), (ids != 0).astype(np.int32)


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """These programs are compiled once and run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
