"""The live oracle: transformers' SwitchTransformers with random weights, and draws of configs and batches to compare on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def huggingface_config(**changes) -> transformers.SwitchTransformersConfig:
    """A small config: two layers a stack, one of them sparse."""
    defaults = dict(
        vocab_size=67, d_model=24, d_kv=6, num_heads=3, d_ff=40, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_experts=4, expert_capacity=64, router_jitter_noise=0.0, dropout_rate=0.0,
        decoder_start_token_id=0, initializer_factor=0.7,
    )  # fmt: skip
    return transformers.SwitchTransformersConfig(**{**defaults, **changes})


def draw_config(seed: int) -> transformers.SwitchTransformersConfig:
    """A config drawn at random: sizes, layers on each side, sparse layers odd cases included, ties, bias, capacity, activation."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    heads, layers, decoder_layers = pick(1, 2, 4), pick(1, 2, 3, 4), pick(1, 2, 3, 4)
    return huggingface_config(
        vocab_size=int(rng.integers(40, 90)),
        d_model=pick(12, 16, 20),
        d_kv=pick(3, 4, 8),
        num_heads=heads,
        d_ff=pick(16, 24, 33),
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_sparse_encoder_layers=int(rng.integers(0, layers + 2)),
        num_sparse_decoder_layers=int(rng.integers(0, decoder_layers + 2)),
        num_experts=pick(1, 2, 3, 5, 8),
        expert_capacity=pick(1, 2, 3, 64),
        router_bias=pick(True, False),
        tie_word_embeddings=pick(True, False),
        dense_act_fn=pick("relu", "gelu", "gelu_new", "silu"),
        relative_attention_num_buckets=pick(8, 32),
        relative_attention_max_distance=pick(20, 128),
        pad_token_id=0,
        router_z_loss_coef=pick(0.0, 0.01),
        router_aux_loss_coef=pick(0.0, 0.05),
    )


def huggingface_model(config, seed: int = 0, kind=transformers.SwitchTransformersForConditionalGeneration):
    """A model with random weights whose every part matters: norms and biases are not left at 1 and 0."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.mul_(1.0 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("classifier.bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name.endswith("relative_attention_bias.weight"):
                parameter.mul_(3.0)
    return model


def save(model, folder: Path, **options) -> Path:
    """`save_pretrained`, returning the folder."""
    model.save_pretrained(folder, **options)
    return folder


@dataclasses.dataclass
class Batch:
    """Inputs of both sides, as numpy arrays."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    decoder_input_ids: np.ndarray
    decoder_attention_mask: np.ndarray
    labels: np.ndarray

    def torch(self, *names: str) -> dict:
        """The named (or all) fields as tensors."""
        names = names or tuple(field.name for field in dataclasses.fields(self))
        return {name: torch.tensor(getattr(self, name)) for name in names}

    def numpy(self, *names: str) -> dict:
        """The named (or all) fields as arrays."""
        names = names or tuple(field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names}


def draw_batch(config, seed: int, *, padding: str = "right", batch: int = 3, source: int = 11, target: int = 7) -> Batch:
    """Ids with padding on the `left`, on the `right`, or a row of which nothing is real (`zeros`); labels with -100."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, config.vocab_size, (batch, source))
    decoder_input_ids = rng.integers(3, config.vocab_size, (batch, target))
    labels = rng.integers(3, config.vocab_size, (batch, target))
    labels[rng.random(labels.shape) < 0.2] = -100
    lengths, target_lengths = rng.integers(2, source + 1, batch), rng.integers(2, target + 1, batch)
    masks = np.arange(source) < lengths[:, None], np.arange(target) < target_lengths[:, None]
    if padding == "left":
        masks = masks[0][:, ::-1], masks[1][:, ::-1]
    mask, decoder_mask = masks[0].astype(np.int64), masks[1].astype(np.int64)
    if padding == "zeros":
        mask[0] = 0
        decoder_mask[-1] = 0
    return Batch(np.where(mask, input_ids, 0), mask.copy(), decoder_input_ids, decoder_mask.copy(), labels)
