"""A 4+4-layer Switch encoder-decoder against flaxformer: logits, losses, routing metrics and gradients."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_switch.config import SwitchConfig
from flax_switch.nn.init import init_params, logical_axes
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.losses import seq2seq_loss

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = np.load(GOLDENS / "model_switch_relu_tied_4x4_mixed2.npz")
TREE = json.loads((GOLDENS / "param_tree_switch_relu_tied_4x4_mixed2.json").read_text())
CONFIG = SwitchConfig(
    vocab_size=64,
    d_model=32,
    num_heads=4,
    d_kv=8,
    d_ff=48,
    num_encoder_layers=4,
    num_decoder_layers=4,
    num_sparse_encoder_layers=2,
    num_sparse_decoder_layers=2,
    num_experts=4,
    routing_group="flaxformer",
    group_size=64,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    dropout_rate=0.0,
)


@pytest.fixture(scope="module")
def params():
    flat = {k.removeprefix("param/"): jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith("param/")}
    return unflatten_dict(flat, sep="/")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """flaxformer's groups depend on the number of devices; the golden comes from one."""
    monkeypatch.setattr("flax_switch.nn.moe.flaxformer_replicas", lambda num_experts: 1)


@functools.partial(jax.jit, static_argnames="deterministic")
def run(params, deterministic):
    source, target = GOLDEN["tokens/encoder_input_tokens"], GOLDEN["tokens/decoder_target_tokens"]
    inputs = GOLDEN["tokens/decoder_input_tokens"]
    tokens = inputs > 0
    tokens[:, 0] = True  # the start token is a token
    return SwitchTransformer(CONFIG).apply(
        {"params": params},
        source,
        inputs,
        source > 0,
        target > 0,
        decoder_padding_mask=jnp.asarray(tokens),
        deterministic=deterministic,
    )


def test_the_parameter_tree_and_its_axes_are_the_canonical_ones():
    model = SwitchTransformer(CONFIG)
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), sep="/")
    axes = flatten_dict(logical_axes(model), sep="/")
    assert {k: list(v.shape) for k, v in shapes.items()} == {k: v["shape"] for k, v in TREE.items()}
    assert {k: list(v) for k, v in axes.items()} == {k: v["axes"] for k, v in TREE.items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_equal_flaxformers(params, mode):
    logits = run(params, deterministic=mode == "eval").logits
    np.testing.assert_allclose(logits, GOLDEN[f"{mode}/logits"], atol=1e-5)


def test_losses_metrics_and_gradients_equal_flaxformers(params):
    labels = np.where(GOLDEN["tokens/decoder_target_tokens"] > 0, GOLDEN["tokens/decoder_target_tokens"], -100)

    config = CONFIG.replace(router_z_loss_coef=1e-3)  # as the golden loss

    @jax.jit
    def loss_fn(params):
        output = run(params, deterministic=False)
        return seq2seq_loss(output, labels, config).loss, output

    (_, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    loss = seq2seq_loss(output, labels, config)
    np.testing.assert_allclose(loss.load_balancing_loss * 0.01, GOLDEN["train/aux_loss"], rtol=1e-5)
    np.testing.assert_allclose(loss.router_z_loss * 1e-3, GOLDEN["train/router_z_loss"], rtol=1e-5)
    np.testing.assert_allclose(loss.z_loss, GOLDEN["train/z_loss"], rtol=1e-4)
    np.testing.assert_allclose(loss.loss, GOLDEN["train/total_loss"], rtol=1e-5)
    for stack, routers in (("encoder", output.encoder_router), ("decoder", output.decoder_router)):
        for i, router in zip((1, 3), routers, strict=True):
            golden = {k.rsplit("/", 1)[1]: v for k, v in GOLDEN.items() if f"metric/{stack}/layers_{i}" in k}
            np.testing.assert_allclose(router.load_balancing_loss, golden["auxiliary_loss"].item(), rtol=1e-5)
            np.testing.assert_allclose(router.z_loss, golden["router_z_loss"].item(), rtol=1e-5)
            for name in ("expert_usage", "fraction_tokens_left_behind", "router_confidence"):
                np.testing.assert_allclose(router.metrics[name], golden[name].item(), rtol=1e-5, atol=1e-6)
    flat = flatten_dict(grads, sep="/")
    for path, grad in flat.items():
        np.testing.assert_allclose(jnp.linalg.norm(grad), GOLDEN[f"train/grad_norm/{path}"], rtol=1e-4)
        if f"train/grad/{path}" in GOLDEN:
            np.testing.assert_allclose(grad, GOLDEN[f"train/grad/{path}"], rtol=1e-4, atol=1e-6)
