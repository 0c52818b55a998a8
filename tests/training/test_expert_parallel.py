"""What a compiled expert-parallel train step sends: two all-to-alls there and two back, and no expert's weights."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, SwitchConfig
from flax_switch.nn.moe import SparseMLP
from flax_switch.parallel.mesh import batch_sharding, create_mesh
from flax_switch.parallel.placement import placed_on
from flax_switch.plan.collectives import collectives
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

ROWS, LENGTH = 16, 32  # of source and target alike
MODEL = SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8, capacity_factor=1.25, min_expert_capacity=1,
)  # fmt: skip


def compiled(model, mesh_config, devices=None):
    """The HLO of a train step, and its run."""
    config = ExperimentConfig(model=model, data=DataConfig(batch_size=ROWS), mesh=mesh_config)
    mesh = create_mesh(mesh_config, devices)
    run = build_run(config, mesh)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")
    return collectives(compile_train_step(run).lower(run.abstract_state, dict.fromkeys(names, ids)).compile().as_text()), run


def check_exchanges(found, run, *, bytes_each):
    """Four exchanges a sparse layer, each of the capacity's bytes; nobody is sent an expert's kernel."""
    model, mesh = run.config.model, run.mesh
    layers = len(model.encoder.sparse_layers + model.decoder.sparse_layers)
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert sum(c.count for c in exchanges) == 4 * layers
    ways = mesh.shape["expert"]
    tokens = ROWS * LENGTH / (ways * mesh.shape["data"])  # of a device
    bound = model.capacity_factor * tokens * model.d_model * bytes_each * (1 - 1 / ways)
    peers = {tuple(sorted(column)) for data in mesh.device_ids for column in data.T.tolist()}
    for exchange in exchanges:
        assert 0.99 * bound <= exchange.wire_bytes <= 1.05 * bound
        assert {tuple(sorted(group)) for group in exchange.groups} == peers or ways == math.prod(mesh.shape.values())
    kernel = model.num_experts * model.d_model * model.d_ff * bytes_each
    gathered = [c for c in found if c.kind == "all-gather" and c.bytes >= kernel / ways]
    assert not gathered
    assert not [c for c in found if c.kind == "collective-permute" and c.bytes >= kernel / ways]


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        (MeshConfig(data=1, expert=8), "full"),
        pytest.param(MeshConfig(data=1, expert=8), "none", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, expert=4), "minimal", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, expert=2, model=2), "full", marks=pytest.mark.slow),
    ],
    ids=["1x8x1-full", "1x8x1-none", "2x4x1-minimal", "2x2x2-full"],
)
def test_a_sparse_layer_exchanges_twice_forward_and_twice_backward(mesh, remat):
    found, run = compiled(MODEL.replace(remat_policy=remat, dropout_rate=0.0), mesh)
    check_exchanges(found, run, bytes_each=4)


def test_groups_that_would_lie_on_two_devices_are_left_to_the_partitioner_and_said_so(caplog):
    config = MODEL.replace(routing_group="tokens", group_size=48, dropout_rate=0.0)
    module, x = SparseMLP(config), jnp.asarray(np.random.default_rng(0).normal(size=(8, 12, 16)), jnp.float32)
    variables = nn.unbox(module.init(jax.random.key(0), x[:1], padding_mask=None, deterministic=True))
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    apply = functools.partial(module.apply, padding_mask=None, deterministic=True)
    want = jax.jit(apply)(variables, x)
    got = jax.jit(functools.partial(apply, devices=placed_on(mesh)))(variables, jax.device_put(x, batch_sharding(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.device_get(got), jax.device_get(want))
    assert "would cut through groups" in caplog.text


@pytest.mark.slow
def test_scanned_layers_exchange_as_often():
    model = MODEL.replace(
        remat_policy="full", scan_layers=True, num_encoder_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
    )  # fmt: skip
    found, run = compiled(model, MeshConfig(data=2, expert=4))
    check_exchanges(found, run, bytes_each=4)


@pytest.mark.hardware("tpu")
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, expert=8), MeshConfig(data=1, expert=8, model=2)], ids=["2x8x1", "1x8x2"])
def test_on_a_tpu_topology_what_is_exchanged_is_bfloat16(mesh):
    topology = tpu_topology("v5e:4x4")
    model = MODEL.replace(dtype="bfloat16", remat_policy="full", d_model=128, d_ff=256, d_kv=64, vocab_size=256)
    found, run = compiled(model, mesh, topology.devices)
    check_exchanges(found, run, bytes_each=2)


@pytest.mark.hardware("tpu")
def test_on_a_tpu_topology_dropless_layers_exchange_ragged_rows():
    topology = tpu_topology("v5e:4x4")
    model = MODEL.replace(
        dtype="bfloat16", remat_policy="full", d_model=128, d_ff=256, d_kv=64, vocab_size=256, capacity_mode="dropless"
    )
    found, run = compiled(model, MeshConfig(data=2, expert=8), topology.devices)
    exchanges = [c for c in found if c.kind == "ragged-all-to-all"]
    assert sum(c.count for c in exchanges) == 4 * 2
    kernel = model.num_experts * model.d_model * model.d_ff * 2
    assert not [c for c in found if c.kind == "all-gather" and c.bytes >= kernel / 8]


def tpu_topology(name):
    """A TPU topology without the hardware."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name)
