"""How parameters begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer

MODEL = SwitchConfig(
    vocab_size=64, d_model=64, num_heads=4, d_kv=16, d_ff=64, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip


def attended_like(config):
    """For each head of the first cross-attention, how often a target's token attends most to the same token in the inputs."""
    model = SwitchTransformer(config)
    random = np.random.default_rng(0)
    inputs = np.stack([random.permutation(np.arange(2, 64))[:24] for _ in range(8)])
    targets = np.stack([random.permutation(row) for row in inputs])
    params = init_params(model, jax.random.key(0))
    output = model.apply({"params": params}, jnp.asarray(inputs), jnp.asarray(targets), output_attentions=True)
    most = np.asarray(output.cross_attentions[0]).argmax(-1)  # [B, H, L]
    return (np.take_along_axis(inputs[:, None], most, axis=2) == targets[:, None]).mean((0, 2))


@pytest.mark.parametrize("scan", [False, True])
def test_copying_heads_begin_by_attending_to_like_tokens_and_others_do_not(scan):
    layout = dict(scan_layers=True, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2) if scan else {}
    like = attended_like(MODEL.replace(copying_heads=2, **layout))
    assert like[:2].min() > 0.5, like  # by chance 1 in 24
    assert like[2:].max() < 0.2, like


def test_nothing_else_begins_otherwise():
    plain, copying = (init_params(SwitchTransformer(MODEL.replace(copying_heads=n)), jax.random.key(0)) for n in (0, 1))
    different = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (plain, copying)), strict=True)
        if not np.array_equal(a, b)
    }
    assert different == {f"decoder/layers_{i}/encoder_decoder_attention/key/kernel" for i in range(2)}


def test_more_copying_heads_than_heads_are_refused():
    with pytest.raises(ConfigError, match="copying_heads must be at most 4; it is 5"):
        MODEL.replace(copying_heads=5)
