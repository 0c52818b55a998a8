"""The train step: micro-batches, frozen parameters, schedules, and states laid out over meshes."""

import functools
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.parallel.mesh import batch_ways, create_mesh, mesh_shape, partition_spec, shard_batch
from flax_switch.training.optimizer import learning_rate_schedule
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_train_step, loss_and_grads

MODEL = SwitchConfig(
    vocab_size=32, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL,
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig(name="adafactor", schedule="constant", learning_rate=0.05, warmup_steps=0, min_dim_size_to_factor=8),
    train=TrainConfig(steps=10),
)


def make_batch(rows=8, source=6, target=5):
    random = np.random.default_rng(0)
    lengths = random.integers(2, target + 1, rows)
    labels = np.where(np.arange(target) < lengths[:, None], random.integers(3, 32, (rows, target)), -100)
    decoder_inputs = np.concatenate([np.zeros((rows, 1), int), np.maximum(labels, 0)[:, :-1]], 1)
    return {
        "input_ids": random.integers(3, 32, (rows, source)).astype(np.int32),
        "attention_mask": np.ones((rows, source), np.int32),
        "decoder_input_ids": decoder_inputs.astype(np.int32),
        "decoder_attention_mask": (labels >= 0).astype(np.int32),
        "labels": labels.astype(np.int32),
    }


def run_on(config, devices=1):
    return build_run(config, create_mesh(config.mesh, jax.devices()[:devices]))


@pytest.mark.quick
@pytest.mark.parametrize("normalizer", ["real_target_tokens", pytest.param("average_per_sequence", marks=pytest.mark.slow)])
def test_micro_batches_have_the_gradients_and_metrics_of_the_whole_batch(normalizer):
    whole = CONFIG.replace(model=MODEL.replace(loss_normalizer=normalizer))
    split = whole.replace(train=TrainConfig(steps=10, microbatches=4))
    batch, rng = make_batch(), jax.random.key(0)
    params = init_state(run_on(whole)).params
    results = [jax.jit(functools.partial(loss_and_grads, run_on(c)))(params, batch, rng) for c in (whole, split)]
    for _, metrics in results:
        routers = metrics.pop("routers")  # of these, ratios of counts are not means over the pieces; the losses are
        metrics.update({k: v for k, v in routers.items() if "loss" in k})
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_model_learns_a_batch_by_heart(name):
    config = CONFIG.replace(optimizer=CONFIG.optimizer.replace(name=name, learning_rate=0.1 if name == "adafactor" else 0.01))
    run = run_on(config)
    state, step, batch = init_state(run), compile_train_step(run), make_batch()
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 60


def test_only_parameters_that_match_are_trained():
    config = CONFIG.replace(optimizer=CONFIG.optimizer.replace(trainable="router", name="adamw", weight_decay=0.1))
    run = run_on(config)
    state = init_state(run)
    before = flatten_dict(jax.device_get(state.params), sep="/")
    state, _ = compile_train_step(run)(state, make_batch())
    for path, value in flatten_dict(state.params, sep="/").items():
        assert np.array_equal(value, before[path]) == ("router" not in path), path
    with pytest.raises(ConfigError, match="matches no parameter"):
        run_on(config.replace(optimizer=config.optimizer.replace(trainable="ruoter")))


def test_schedules_start_move_and_end_where_they_should():
    def at(step, **settings):
        return float(learning_rate_schedule(OptimizerConfig(**settings), 100)(step))

    assert at(0) == pytest.approx(0.01)  # rsqrt with 10,000 steps of warm-up
    assert at(40_000) == pytest.approx(0.005)
    linear = dict(schedule="linear", learning_rate=1.0, warmup_steps=10)
    assert [at(s, **linear) for s in (0, 9, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])
    assert at(100, schedule="cosine", learning_rate=1.0, warmup_steps=0, final_learning_rate=0.1) == pytest.approx(0.1)
    assert at(77, schedule="constant", learning_rate=0.3, warmup_steps=0) == pytest.approx(0.3)


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_sharded_step_equals_the_step_on_one_device(optimizer):
    config = CONFIG.replace(optimizer=CONFIG.optimizer.replace(name=optimizer))
    batch, results = make_batch(), []
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(data=2, expert=2, model=2, fsdp=True), 8)):
        run = run_on(config.replace(mesh=mesh), devices)
        state, step = init_state(run), compile_train_step(run)
        for _ in range(2):
            state, metrics = step(state, shard_batch(batch, run.mesh))
        results.append(jax.device_get((state.params, metrics)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_parameters_and_statistics_are_split_by_the_rules():
    run = run_on(CONFIG.replace(mesh=MeshConfig(data=2, expert=2, model=2, fsdp=True)), 8)
    state = init_state(run)
    experts = state.params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]  # [4, 16, 16]
    assert experts.sharding.spec == P("expert", "data", "model")
    assert experts.addressable_shards[0].data.shape == (2, 8, 8)
    row = state.opt_state.row["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]
    assert row.addressable_shards[0].data.shape == (2, 8)
    router = state.params["encoder"]["layers_0"]["mlp"]["router"]["router_weights"]["w"]["kernel"]
    assert router.sharding.spec == P(("expert", "data"))


def test_meshes_that_do_not_fit_are_refused():
    assert mesh_shape(MeshConfig(data=-1, expert=4), 8) == (2, 4, 1)
    with pytest.raises(ConfigError, match="do not fit 8 devices"):
        mesh_shape(MeshConfig(expert=3), 8)
    with pytest.raises(ConfigError, match="need 4 devices; there are 8"):
        mesh_shape(MeshConfig(data=4), 8)
    mesh = create_mesh(MeshConfig(expert=8))
    assert batch_ways(mesh) == 8
    with pytest.raises(ConfigError, match="12 experts cannot be split"):
        partition_spec(("expert", "embed"), (12, 4), mesh)
    assert partition_spec(("vocab", "embed"), (7, 4), create_mesh(MeshConfig(model=8))) == P()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPUs")
def test_a_processors_step_updates_parameters_where_they_lie():
    model = MODEL.replace(d_model=32, d_ff=64, num_encoder_layers=2, num_decoder_layers=2, moe_executor="ragged")
    run = run_on(CONFIG.replace(model=model, optimizer=OptimizerConfig(name="adamw", learning_rate=0.05)))
    program = compile_train_step(run).lower(run.abstract_state, make_batch()).compile().as_text()
    kernels = {leaf.shape for leaf in jax.tree.leaves(run.abstract_state.params) if leaf.size >= 1024}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(%state_params", program)
    assert re.search(r"%state_params\S* = f32\[\S* parameter", program)  # arguments bear the names that the pattern relies on
    assert not [shape for shape in copies if tuple(map(int, shape.split(","))) in kernels]
