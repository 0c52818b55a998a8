"""Stochastic rounding: on average nothing is lost, and what is exact stays exact."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
from flax_switch.parallel.mesh import create_mesh, shard_batch
from flax_switch.training.rounding import apply_rounded, in_float32, rounded
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_train_step

MODEL = SwitchConfig(
    vocab_size=32, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=2, dropout_rate=0.0, param_dtype="bfloat16",
)  # fmt: skip


def test_a_number_becomes_one_of_its_neighbours_and_on_average_itself():
    x = (np.random.default_rng(0).normal(size=64) * 10.0 ** np.arange(-32, 32)).astype(np.float32)
    draws = np.asarray(
        jax.jit(jax.vmap(lambda key: rounded(jnp.asarray(x), key)))(jax.random.split(jax.random.key(1), 4096)), np.float32
    )
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)
    assert ((draws == low) | (draws == high)).all()
    share = (draws == high).mean(0)
    wanted = (x - low) / (high - low)
    assert np.abs(share - wanted).max() < 5 * 0.5 / 4096**0.5


def test_what_bfloat16_holds_and_what_is_not_finite_stay():
    held = np.asarray([0.0, -0.0, 1.0, -2.5, 3e38, 1e-38], ml_dtypes.bfloat16).astype(np.float32)
    for key in jax.random.split(jax.random.key(0), 8):
        np.testing.assert_array_equal(np.asarray(rounded(jnp.asarray(held), key), np.float32), held)
        others = np.asarray(rounded(jnp.asarray([np.inf, -np.inf, np.nan], jnp.float32), key), np.float32)
        np.testing.assert_array_equal(others, [np.inf, -np.inf, np.nan])


def test_small_updates_add_up_where_rounding_to_the_nearest_loses_them():
    params, update = jnp.ones(2000, jnp.bfloat16), jnp.full(2000, 1e-3)

    def step(held, key):
        nearest, by_chance = held
        return (optax.apply_updates(nearest, update), apply_rounded(by_chance, update, key)), None

    (nearest, by_chance), _ = jax.jit(lambda keys: jax.lax.scan(step, (params, params), keys))(
        jax.random.split(jax.random.key(0), 400)
    )
    assert (nearest == 1).all()  # 1.001 is nearest to 1
    assert by_chance.dtype == jnp.bfloat16
    np.testing.assert_allclose(by_chance.astype(jnp.float32).mean(), 1.4, atol=0.005)


def run_of(**optimizer):
    config = ExperimentConfig(
        model=MODEL, data=DataConfig(batch_size=8), optimizer=OptimizerConfig(schedule="constant", warmup_steps=0, **optimizer)
    )
    return build_run(config, create_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_run_holds_parameters_in_bfloat16_and_moves_them_as_float32_would(name):
    ids = np.random.default_rng(0).integers(1, 32, (8, 8)).astype(np.int32)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")
    moved = {}
    for by_chance in (True, False):
        run = run_of(name=name, learning_rate=1e-4, multiply_by_parameter_scale=False, stochastic_rounding=by_chance)
        state, step = init_state(run), compile_train_step(run)
        if by_chance:
            assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} <= {"float32", "int32"}
        before = jax.device_get(state.params)
        for _ in range(20):
            state, _ = step(state, shard_batch(dict.fromkeys(names, ids), run.mesh))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
        scale = lambda params: np.asarray(params["encoder"]["encoder_norm"]["scale"], np.float32)  # noqa: E731
        moved[by_chance] = np.abs(scale(jax.device_get(state.params)) - scale(before)).max()
    assert moved[True] > 0 == moved[False]  # norms begin at 1, where bfloat16's next numbers are 0.004 and 0.008 away


def test_a_state_in_float32_and_other_parameters_than_bfloat16():
    optimizer = in_float32(optax.with_extra_args_support(optax.adam(1e-3)))
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, state))} == {"float32", "int32"}
    with pytest.raises(ConfigError, match=r"is for parameters in bfloat16; model\.param_dtype is 'float32'"):
        config = ExperimentConfig(model=MODEL.replace(param_dtype="float32"), optimizer=OptimizerConfig(stochastic_rounding=True))
        build_run(dataclasses.replace(config), create_mesh(MeshConfig()))
