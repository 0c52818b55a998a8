"""Small Hugging Face models, briefly trained so that their distributions are not flat, and the same weights as ours."""

from types import SimpleNamespace

import numpy as np

from flax_switch.pretrained import load_pretrained

VOCAB, EOS = 48, 1


def huggingface_model(**changes):
    import torch  # here, so that tests that need no oracle run without it
    import transformers

    settings = dict(
        vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0, dropout_rate=0.0,
        router_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**{**settings, **changes})
    ).eval()


def noisy_chains(rng, batch):
    """Sources of random words, EOS and padding; targets that mostly follow a chain of tokens from the source's first one."""
    sources, targets = np.zeros((batch, 9), np.int64), np.full((batch, 9), -100, np.int64)
    for i in range(batch):
        word = rng.integers(3, VOCAB, rng.integers(2, 9))
        sources[i, : len(word) + 1] = [*word, EOS]
        chain = [word[0]]
        while len(chain) < len(word):
            chain.append(rng.integers(3, VOCAB) if rng.random() < 0.2 else 3 + (5 * chain[-1] + 1) % (VOCAB - 3))
        targets[i, : len(word) + 1] = [*chain, EOS]
    return sources, targets


def train(model, steps):
    import torch

    torch.set_num_threads(1)  # these products are too small to share
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        sources, targets = map(torch.from_numpy, noisy_chains(rng, 32))
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
