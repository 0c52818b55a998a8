"""The mesh changes nothing but where things lie: losses, metrics, gradients and parameters are those of one device."""

import functools

import jax
import numpy as np
import pytest

from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.ops.kernels import fused_attention
from flax_switch.parallel.mesh import create_mesh, shard_batch
from flax_switch.training.metrics import read_metrics
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import loss_and_grads
from flax_switch.training.stepper import build_stepper
from flax_switch.workflows.pretrain import pretrain

MODEL = SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8, capacity_factor=1.25, min_expert_capacity=1,
    dropout_rate=0.0, init_scale=1.0, router_z_loss_coef=0.01,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(schedule="constant", learning_rate=0.02, warmup_steps=0, min_dim_size_to_factor=8, clip_global_norm=0.5)
MODELS = {
    "capacity": MODEL,
    "tokens": MODEL.replace(routing_group="tokens", group_size=16, num_selected_experts=2, ignore_padding_tokens=True),
    # at first every token chooses the same two experts, for which their device has room in many further rounds
    "dropless": MODEL.replace(
        capacity_mode="dropless", num_selected_experts=2, router_init_std=0.0, expert_parallel_buffer_factor=0.25
    ),
    "hash": MODEL.replace(router_type="hash", capacity_mode="dropless"),
}
STEPS = 5


def make_batch(rows=16, source=8, target=8):
    random = np.random.default_rng(0)
    lengths = random.integers(2, target + 1, rows)
    labels = np.where(np.arange(target) < lengths[:, None], random.integers(3, 64, (rows, target)), -100)
    decoder_inputs = np.concatenate([np.zeros((rows, 1), int), np.maximum(labels, 0)[:, :-1]], 1)
    return {
        "input_ids": random.integers(3, 64, (rows, source)).astype(np.int32),
        "attention_mask": (np.arange(source) < random.integers(3, source + 1, rows)[:, None]).astype(np.int32),
        "decoder_input_ids": decoder_inputs.astype(np.int32),
        "decoder_attention_mask": (labels >= 0).astype(np.int32),
        "labels": labels.astype(np.int32),
    }


def build(model, mesh, microbatches=1, optimizer=OPTIMIZER, **settings):
    config = ExperimentConfig(
        model=MODELS[model].replace(**settings),
        data=DataConfig(batch_size=16),
        optimizer=optimizer,
        mesh=mesh,
        train=TrainConfig(steps=10, microbatches=microbatches),
    )
    devices = jax.devices()[: max(1, mesh.data) * mesh.expert * mesh.model]
    return build_run(config, create_mesh(mesh, devices))


ONE = MeshConfig(data=1)


def train(run, state=None, steps=STEPS):
    """The state after some steps in its global form, and the metrics of each but of choices that waited, which the mesh decides."""
    stepper, batch, history = build_stepper(run), make_batch(), []
    state = stepper.hold(init_state(run) if state is None else state)
    for _ in range(steps):
        state, metrics = stepper.step(state, batch)
        history.append(jax.device_get(metrics))
    waited = sum(metrics["routers"].pop("choices_overflowed").sum() for metrics in history)
    if run.config.model.expert_parallel_buffer_factor < 1:
        assert (waited > 0) == (run.mesh.shape["expert"] > 1)
    return jax.device_get(stepper.release(state)), history


@functools.cache
def on_one_device(model):
    return train(build(model, ONE))


def compare(got, want, rtol=2e-4, atol=2e-5):
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, expert=8),
    MeshConfig(data=2, expert=2, model=2),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=2, expert=2, model=2, fsdp=True),
    MeshConfig(data=2, expert=4, mode="pmap"),
    MeshConfig(data=1, expert=8, mode="pmap"),
    MeshConfig(data=8, mode="pmap"),
    MeshConfig(data=4, expert=2, dcn_data=2, fsdp=True),
    MeshConfig(data=2, expert=4, dcn_expert=2),
]


def name(mesh):
    slices = f"-slices-{mesh.dcn_data}x{mesh.dcn_expert}" * (mesh.dcn_data * mesh.dcn_expert > 1)
    return f"{mesh.data}x{mesh.expert}x{mesh.model}" + mesh.fsdp * "-fsdp" + (mesh.mode == "pmap") * "-pmap" + slices


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=name)
@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_trains_alike(model, mesh):
    compare(train(build(model, mesh)), on_one_device(model))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES[4], *MESHES[8:]], ids=name)
@pytest.mark.parametrize("model", ["capacity", "dropless"])
def test_every_mesh_trains_alike_with_the_kernels_of_tpus(model, mesh, monkeypatch):
    """With fused attention, interpreted, and without."""
    monkeypatch.setattr(fused_attention, "DEFAULT", {"other": "mosaic"})
    monkeypatch.setitem(fused_attention.PASSES, "mosaic", functools.partial(fused_attention.PASSES["mosaic"], interpret=True))
    compare(train(build(model, mesh, attention_implementation="fused")), on_one_device(model))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[4:6], ids=name)
@pytest.mark.parametrize("optimizer", ["adamw_rms", "muon"])
def test_every_mesh_trains_alike_with_rates_relative_to_parameters(optimizer, mesh):
    relative = OPTIMIZER.replace(name=optimizer, b2=0.98, eps=1e-3)
    run, alone = (build("capacity", where, optimizer=relative) for where in (mesh, ONE))
    compare(train(run, steps=3)[0].params, train(alone, steps=3)[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, *MESHES[2:4], MESHES[5]], ids=name)
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_train_alike_on_every_mesh(model, mesh):
    run = build(model, mesh, microbatches=2)
    if (model, mesh.mode) == ("tokens", "pmap"):  # the one row a device then has is half a group
        with pytest.raises(ConfigError, match="would cut through groups"):
            train(run, steps=1)
        return
    state, metrics = train(run)
    whole_state, whole_metrics = on_one_device(model)
    compare(state.params, whole_state.params)
    compare([m["loss"] for m in metrics], [m["loss"] for m in whole_metrics])


def gradients(run):
    @jax.jit
    def run_once(params, batch):
        return loss_and_grads(run, params, batch, jax.random.key(0))

    found, metrics = jax.device_get(run_once(init_state(run).params, shard_batch(make_batch(), run.mesh)))
    metrics["routers"].pop("choices_overflowed")
    return found, metrics


@functools.cache
def gradients_on_one_device(model):
    return gradients(build(model, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[:5], ids=name)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_one_device_and_not_scaled_by_partitions(model, mesh):
    compare(gradients(build(model, mesh)), gradients_on_one_device(model), rtol=2e-5, atol=1e-6)


def test_micro_batches_keep_groups_of_several_rows_whole():
    got, metrics = gradients(build("tokens", ONE, microbatches=2))
    want, whole_metrics = gradients_on_one_device("tokens")
    compare(got, want, rtol=2e-5, atol=1e-6)
    compare(metrics["loss"], whole_metrics["loss"])


@pytest.mark.parametrize("model", ["capacity", pytest.param("hash", marks=pytest.mark.slow)])
def test_jit_and_pmap_train_as_one_device_does_and_each_continues_the_other(model):
    meshes = [MeshConfig(data=2, expert=2, mode=mode) for mode in ("jit", "pmap")]
    jit, pmap = (build(model, mesh) for mesh in meshes)
    want = on_one_device(model)
    for run in (jit, pmap):
        compare(train(run), want)
    half, _ = train(pmap, steps=2)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), half, jit.abstract_state)
    compare(train(jit, state, steps=3)[0], want[0])
    half, _ = train(jit, steps=2)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), half, pmap.abstract_state)
    compare(train(pmap, state, steps=3)[0], want[0])


def test_pmap_refuses_what_it_cannot_split():
    with pytest.raises(ConfigError, match="needs model=1"):
        MeshConfig(model=2, mode="pmap")
    with pytest.raises(ConfigError, match="'jit', 'pmap'"):
        MeshConfig(mode="pjit")
    with pytest.raises(ConfigError, match="a multiple of 8 devices x train.microbatches"):
        build_stepper(build("capacity", MeshConfig(data=8, mode="pmap"), microbatches=4))
    run = build("tokens", MeshConfig(data=4, mode="pmap"), group_size=48)
    with pytest.raises(ConfigError, match="would cut through groups"):
        train(run, steps=1)


@pytest.mark.slow
def test_a_run_begun_under_jit_continues_under_pmap_and_the_other_way(tmp_path):
    settings = [
        "data.batch_size=8", "data.inputs_length=16", "data.targets_length=8", "model.d_model=16", "model.d_ff=16",
        "model.num_heads=2", "model.d_kv=8", "model.num_encoder_layers=1", "model.num_decoder_layers=1", "model.dropout_rate=0.0",
        "model.num_sparse_encoder_layers=1", "model.num_sparse_decoder_layers=1", "train.log_every=1", "train.eval_every=4",
        "train.eval_batches=1", "train.checkpoint_every=4", "train.sample_spans=0", "mesh.data=2", "mesh.expert=4",
        "model.routing_group=sequence",  # groups of the whole batch, as the recipe has them, lie on no one device
    ]  # fmt: skip
    losses = {}
    for modes in (("jit", "jit"), ("jit", "pmap"), ("pmap", "jit")):
        workdir = tmp_path / "-".join(modes)
        for mode, steps in zip(modes, (4, 8), strict=True):
            result = pretrain(load_recipe("configs/tiny.py", [*settings, f"mesh.mode={mode}", f"train.steps={steps}"]), workdir)
            assert result.step == steps
        losses[modes] = [line["loss"] for line in read_metrics(workdir) if line["kind"] == "train"]
        assert len(losses[modes]) == 8
    np.testing.assert_allclose(losses["jit", "pmap"], losses["jit", "jit"], rtol=2e-4)
    np.testing.assert_allclose(losses["pmap", "jit"], losses["jit", "jit"], rtol=2e-4)
