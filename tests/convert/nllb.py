"""transformers' NllbMoe with random weights, its experts put right: see `right_experts`."""

import types

import numpy as np
import torch
import transformers
from transformers.models.nllb_moe import modeling_nllb_moe

from tests.convert import oracle

SIZES = dict(
    vocab_size=61, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_layerdrop=0.0, decoder_layerdrop=0.0, dropout=0.0, attention_dropout=0.0, init_std=0.3,
)  # fmt: skip
DRAWS = (
    dict(encoder_layers=2, decoder_layers=1, encoder_sparse_step=2, decoder_sparse_step=1, num_experts=5, router_bias=True),
    dict(encoder_layers=3, decoder_layers=2, encoder_sparse_step=1, decoder_sparse_step=2, num_experts=3, scale_embedding=False),
    dict(
        encoder_layers=4, decoder_layers=3, encoder_sparse_step=3, decoder_sparse_step=0, num_experts=2, moe_token_dropout=0.0,
        router_ignore_padding_tokens=True, activation_function="gelu",
    ),
)  # fmt: skip


def right_experts(self, x, chosen, weights):
    """Computes what transformers 4.57 and fairseq do: the sum over a token's experts of weight times output.

    From 5.0 on transformers takes the mask of first choices for numbers of experts, so that none but experts 0 and 1 run.
    """
    y = torch.zeros_like(x)
    for e in range(self.num_experts):
        rows = torch.nonzero(weights[:, e])[:, 0]
        y = y.index_add(0, rows, self[f"expert_{e}"](x[rows]) * weights[rows, e, None] * (1 - self.moe_token_dropout))
    return y


def model_of(seed, kind="NllbMoeForConditionalGeneration", **changes):
    """A model in evaluation mode whose every part matters: norms and biases are not left at 1 and 0."""
    config = transformers.NllbMoeConfig(**{**SIZES, **DRAWS[seed % len(DRAWS)], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, getattr(modeling_nllb_moe, "NllbMoeExperts", ())):  # 4.57 has none, and computes what is right
            module.forward = types.MethodType(right_experts, module)
    return model


def batch_of(config, seed, padding="right"):
    """Ids with the model's own padding."""
    batch = oracle.draw_batch(config, seed, padding=padding)
    batch.input_ids = np.where(batch.attention_mask == 1, batch.input_ids, config.pad_token_id)
    batch.decoder_input_ids = np.where(batch.decoder_attention_mask == 1, batch.decoder_input_ids, config.pad_token_id)
    return batch
