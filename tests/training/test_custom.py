"""A loop of one's own from `init_params`, `TrainState`, `optimizer` and `train_step` makes the updates that a run makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_switch as fs
from flax_switch.config import ExperimentConfig, MeshConfig, OptimizerConfig, TrainConfig
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training import custom, step
from flax_switch.training.state import build_run

CONFIG = fs.SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, router_jitter_noise=0.01,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 60, (4, 6))
BATCH = {"input_ids": IDS, "labels": IDS[:, :5]}
SETTINGS = dict(name="adamw", schedule="cosine", learning_rate=0.01, warmup_steps=2)


def fresh(optimizer):
    return fs.TrainState.create(fs.init_params(CONFIG, jax.random.key(0)), optimizer, jax.random.key(1))


def test_parameters_of_a_config_are_those_of_its_model():
    key, model = jax.random.key(3), fs.SwitchTransformer(CONFIG)
    found = fs.init_params(CONFIG, key)
    jax.tree.map(np.testing.assert_array_equal, found, fs.init_params(model, key))
    expected = jax.eval_shape(lambda: model.init(key, IDS, IDS)["params"])
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_updates_are_those_of_a_run():
    optimizer = fs.optimizer(CONFIG, steps=10, **SETTINGS)
    config = ExperimentConfig(model=CONFIG, optimizer=OptimizerConfig(**SETTINGS), train=TrainConfig(steps=10))
    run = build_run(config, create_mesh(MeshConfig(), jax.devices()[:1]))
    whole = {
        "attention_mask": np.ones_like(IDS), "decoder_attention_mask": np.ones((4, 5), int),
        "decoder_input_ids": np.pad(IDS[:, :4], ((0, 0), (1, 0))),
    }  # fmt: skip
    theirs, make = fresh(optimizer), jax.jit(lambda state, batch: step.train_step(run, state, batch))
    mine = fresh(optimizer)
    for _ in range(3):
        mine, metrics = fs.train_step(CONFIG, optimizer, mine, BATCH)
        theirs, expected = make(theirs, {**BATCH, **whole})
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine.params, theirs.params)
    assert int(mine.step) == 3 and "learning_rate" not in metrics


@pytest.mark.parametrize("optimizer", [optax.adam(0.01), None], ids=["optax", "ours"])
def test_any_optimiser_lowers_the_loss_of_a_batch_it_sees_again(optimizer):
    optimizer = optimizer or fs.optimizer(CONFIG)
    state, losses = fresh(optimizer), []
    for _ in range(12):
        state, metrics = fs.train_step(CONFIG, optimizer, state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


def test_padding_has_no_part_in_an_update():
    config = dataclasses.replace(CONFIG, dropout_rate=0.0, router_jitter_noise=0.0, ignore_padding_tokens=True, capacity_factor=4.0)
    optimizer = optax.sgd(0.1)
    state = fresh(optimizer)
    padded = {"input_ids": np.pad(IDS, ((0, 0), (0, 3))), "labels": np.pad(IDS[:, :5], ((0, 0), (0, 2)), constant_values=-100)}
    _, alone = fs.train_step(config, optimizer, jax.tree.map(jnp.copy, state), BATCH)
    _, filled = fs.train_step(config, optimizer, state, padded)
    np.testing.assert_allclose(filled["cross_entropy"], alone["cross_entropy"], rtol=1e-5)
    assert float(filled["target_tokens"]) == 20


def test_a_loss_that_is_no_number_changes_nothing_but_the_step():
    optimizer = optax.sgd(0.1)
    state = fresh(optimizer)
    state = dataclasses.replace(state, params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    state, metrics = fs.train_step(CONFIG, optimizer, state, BATCH)
    assert float(metrics["skipped"]) == 1 and int(state.step) == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS}, "A batch has input_ids and labels, and may have attention_mask.*; this one has input_ids"),
        ({**BATCH, "label": IDS}, "this one has input_ids, labels, label"),
        ({**BATCH, "labels": IDS[:2]}, r"input_ids \[4, 6\], labels \[2, 6\]"),
        ({**BATCH, "input_ids": [[1], [2, 3]]}, "rows of different lengths"),
        ({**BATCH, "labels": IDS + 60}, "labels holds"),
        ({**BATCH, "attention_mask": [[1]]}, "attention_mask must have the shape of input_ids"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_by_name(batch, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(fs.ConfigError, match=message):
        fs.train_step(CONFIG, optimizer, fresh(optimizer), batch)


def test_a_decoder_only_batch_needs_labels_alone_and_nothing_else_may_be_in_it():
    alone = dataclasses.replace(CONFIG, architecture="decoder_only", num_encoder_layers=0, num_sparse_encoder_layers=0)
    labels = np.where(np.arange(6) < 4, IDS, -100)
    made = custom.complete({"labels": labels}, alone)
    np.testing.assert_array_equal(made["labels"], labels)
    np.testing.assert_array_equal(made["decoder_input_ids"], np.pad(np.where(labels < 0, 0, labels)[:, :-1], ((0, 0), (1, 0))))
    for wrong in ({}, {"decoder_input_ids": IDS}, {"labels": IDS, "input_ids": IDS}):
        with pytest.raises(fs.ConfigError, match="A decoder-only model's batch has labels, and may have decoder_input_ids"):
            custom.complete(wrong, alone)


def test_settings_of_the_optimiser_are_checked():
    with pytest.raises(fs.ConfigError, match="Did you mean 'learning_rate'"):
        fs.optimizer(CONFIG, learning_rat=1.0)
    with pytest.raises(fs.ConfigError, match="optax.masked"):
        fs.optimizer(CONFIG, trainable="router")
