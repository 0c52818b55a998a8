"""Decoders without an encoder against flaxformer: logits, activations, losses, routing metrics, gradients and cached steps."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

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
NAMES = ("t5_dense_relu", "t5_sparse_relu", "fused_dense_swiglu_rotary", "fused_sparse_relu_relative")
MODES = ("causal", "prefix")


def config_of(settings, **changes):
    """Returns our config of a golden's. Its fused layers evaluate with the capacity of training, so that both are that one here."""
    train, evaluation = settings["cap"]
    fused, sparse = settings["fused"], settings["sparse"]
    return SwitchConfig(
        architecture="decoder_only",
        layer_form="fused" if fused else "parallel" if settings["parallel"] else "sequential",
        fused_sparse=tuple(settings["fused_sparse"]),
        positions=settings["pos"],
        scale_attention_logits=settings["rescale"],
        vocab_size=settings["vocab"],
        d_model=settings["d"],
        num_heads=settings["heads"],
        d_kv=settings["head_dim"],
        d_ff=settings["f"],
        num_decoder_layers=settings["layers"],
        num_sparse_decoder_layers=sparse,
        sparse_layout=settings["layout"],
        num_experts=settings["e"],
        num_selected_experts=settings["k"],
        mlp_activations=tuple(settings["act"]),
        extra_mlp=settings["extra_mlp"],
        router_bias=settings["router_bias"],
        ignore_padding_tokens=settings["ignore_padding"],
        tie_word_embeddings=settings["tied"],
        scan_layers=settings["scan"],
        routing_group="flaxformer",
        group_size=settings["group"],
        capacity_factor=train,
        eval_capacity_factor=train if fused else evaluation,
        min_expert_capacity=settings["min_cap"],
        router_z_loss_coef=1e-3,
        relative_attention_num_buckets=settings["buckets"],
        relative_attention_max_distance=settings["max_dist"],
        dropout_rate=0.0,
        **changes,
    )


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """One golden with its config and parameters."""
    arrays = dict(np.load(GOLDENS / f"decoder_only_{request.param}.npz"))
    flat = {k.removeprefix("param/"): jnp.asarray(v) for k, v in arrays.items() if k.startswith("param/")}
    tree = json.loads((GOLDENS / f"param_tree_decoder_only_{request.param}.json").read_text())
    config = config_of(json.loads(str(arrays["cfg"])))
    return SimpleNamespace(arrays=arrays, config=config, params=unflatten_dict(flat, sep="/"), tree=tree)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """flaxformer's groups depend on the number of devices; the goldens come from one."""
    monkeypatch.setattr("flax_switch.nn.moe.flaxformer_replicas", lambda num_experts: 1)


@functools.partial(jax.jit, static_argnames=("config", "deterministic"))
def run(params, config, batch, prefix_mask, deterministic):
    return SwitchTransformer(config).apply(
        {"params": params},
        batch["tokens"],
        attention_mask=(batch["targets"] > 0).astype(jnp.int32),
        segment_ids=batch["segment_ids"],
        prefix_mask=prefix_mask,
        deterministic=deterministic,
        output_hidden_states=True,
        rngs={"dropout": jax.random.key(0)},
    )


def packed(golden, mode):
    """Returns the golden's packed batch, and the mask of inputs where they see each other."""
    batch = {name: golden.arrays[f"packed/{name}"] for name in ("tokens", "targets", "segment_ids")}
    return batch, golden.arrays["packed/prefix"] if mode == "prefix" else None


def metrics_of(golden, mode, kind):
    """Returns the golden's routing metrics by name, each router's in our order."""
    order = {"mlp": 0, "q_wi_fused": 0, "kv_fused": 1, "o_wo_fused": 2}
    found = {}
    for key, value in golden.arrays.items():
        if key.startswith(f"{mode}/{kind}/metric/"):
            *_, layer, part, name = key.split("/")
            found.setdefault(name, {})[layer, order[part]] = value.item()
    return {name: [values[key] for key in sorted(values)] for name, values in found.items()}


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_says_what_flaxformer_says(golden, mode):
    output = run(golden.params, golden.config, *packed(golden, mode), deterministic=True)
    np.testing.assert_allclose(output.logits, golden.arrays[f"{mode}/eval/logits"], atol=1e-5)
    for i, states in enumerate(output.decoder_hidden_states[1:-1]):  # the last is normalised
        key = f"{mode}/eval/act/decoder/layers_{i}/activations"
        if key in golden.arrays:
            np.testing.assert_allclose(states, golden.arrays[key], atol=1e-5)
    check_metrics(output.decoder_router, metrics_of(golden, mode, "eval"))


def check_metrics(routers, expected):
    """Compares losses and metrics of all routers with the golden's."""
    for name, values in expected.items():
        ours = {"auxiliary_loss": "load_balancing_loss", "router_z_loss": "z_loss"}.get(name)
        found = [getattr(r, ours) if ours else r.metrics[name] for r in routers]
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5, err_msg=name)
    assert bool(routers) == bool(expected)


@pytest.mark.parametrize("mode", MODES)
def test_training_says_what_flaxformer_says(golden, mode):
    batch, prefix_mask = packed(golden, mode)
    labels = np.where(golden.arrays[f"{mode}/weights"] > 0, batch["targets"], -100)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients_of(params):
        output = run(params, golden.config, batch, prefix_mask, deterministic=False)
        losses = seq2seq_loss(output, labels, golden.config)
        return losses.loss, (losses, output)

    gradients, (losses, output) = gradients_of(golden.params)
    train = f"{mode}/train"
    np.testing.assert_allclose(output.logits, golden.arrays[f"{train}/logits"], atol=1e-5)
    check_metrics(output.decoder_router, metrics_of(golden, mode, "train"))
    # There the routers' losses have their coefficients.
    ours = {
        "total_loss": losses.loss, "ce_loss": losses.cross_entropy, "z_loss": losses.z_loss,
        "aux_loss": 0.01 * losses.load_balancing_loss, "router_z_loss": 1e-3 * losses.router_z_loss,
    }  # fmt: skip
    for name, value in ours.items():
        np.testing.assert_allclose(value, golden.arrays[f"{train}/{name}"], rtol=1e-5, err_msg=name)
    found = flatten_dict(gradients, sep="/")
    for path, gradient in found.items():
        norm = golden.arrays[f"{train}/grad_norm/{path}"]
        np.testing.assert_allclose(jnp.linalg.norm(gradient.ravel()), norm, rtol=1e-4, atol=1e-7, err_msg=path)
        if f"{train}/grad/{path}" in golden.arrays:
            np.testing.assert_allclose(gradient, golden.arrays[f"{train}/grad/{path}"], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("mode", MODES)
def test_a_call_says_of_single_rows_what_flaxformer_says(golden, mode):
    tokens, lengths, inputs = (golden.arrays[f"step/{name}"] for name in ("tokens", "lengths", "prefix_lengths"))
    batch = {"tokens": tokens, "targets": np.arange(12) < lengths[:, None], "segment_ids": None}
    prefix_mask = (np.arange(12) < inputs[:, None]).astype(np.int32) if mode == "prefix" else None
    # The golden's batch has room for all tokens, as cached steps do.
    config = golden.config.replace(capacity_mode="dropless")
    output = run(golden.params, config, batch, prefix_mask, deterministic=True)
    real = np.arange(12) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(output.logits)[real], golden.arrays[f"step/{mode}/full"][real], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_cached_steps_say_what_flaxformer_says(golden, mode):
    """Rows end their inputs together, filled up on the left: a place of the cache is one step's for all rows."""
    tokens, lengths, inputs = (golden.arrays[f"step/{name}"] for name in ("tokens", "lengths", "prefix_lengths"))
    inputs = inputs if mode == "prefix" else np.ones_like(inputs)
    config = golden.config.replace(capacity_mode="dropless", bidirectional_inputs=mode == "prefix")
    P, steps = int(inputs.max()), 12 - int(inputs.min())
    place = np.arange(P + steps) - (P - inputs)[:, None]  # of each column in its row
    fed = np.take_along_axis(tokens, np.clip(place, 0, 11), axis=1)
    real = place >= 0
    model = SwitchTransformer(config)
    cache = model.apply({"params": golden.params}, len(tokens), P + steps, method="init_cache")

    @functools.partial(jax.jit, static_argnames="causal")
    def decode(params, tokens, cache, padding, causal):
        options = dict(cache=cache, decoder_padding_mask=padding, causal=causal, method="decode")
        output = model.apply({"params": params}, tokens, None, None, real, **options)
        return output.logits, output.cache

    found, cache = decode(golden.params, fed[:, :P], cache, real[:, :P], mode == "causal")
    parts = [found]
    for t in range(P, P + steps):
        found, cache = decode(golden.params, fed[:, t : t + 1], cache, None, True)
        parts.append(found)
    logits = np.concatenate(parts, axis=1)
    expected = golden.arrays[f"step/{mode}/cached"]
    if mode == "prefix":
        expected = np.where(np.isnan(expected), golden.arrays["step/prefix/prefill"], expected)
    compared = 0
    for row, column in zip(*np.nonzero(real), strict=True):
        if (t := place[row, column]) < lengths[row] and not np.isnan(expected[row, t]).any():
            np.testing.assert_allclose(logits[row, column], expected[row, t], atol=1e-5)
            compared += 1
    assert compared == lengths.sum()


def test_parameters_have_flaxformers_names_shapes_and_axes(golden):
    model = SwitchTransformer(golden.config)
    axes = flatten_dict(logical_axes(model), sep="/")
    shapes = {path: list(leaf.shape) for path, leaf in flatten_dict(init_params(model, jax.random.key(0)), sep="/").items()}
    assert shapes == {path: leaf["shape"] for path, leaf in golden.tree.items()}
    assert {path: list(names) for path, names in axes.items()} == {path: leaf["axes"] for path, leaf in golden.tree.items()}
