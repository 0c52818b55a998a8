"""Parameters in parts (mesh.fsdp): what a compiled train step gathers, hands back and keeps, and that it computes the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
from flax_switch.parallel.gathering import InParts, keep_all_but_gathered, without_parts
from flax_switch.parallel.mesh import batch_sharding, create_mesh, partition_spec
from flax_switch.plan.bounds import parameter_bound
from flax_switch.plan.collectives import collectives
from flax_switch.plan.memory import device_bytes
from flax_switch.plan.topology import compile_devices, parse_topology
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

ROWS, LENGTH = 16, 16
MODEL = SwitchConfig(
    architecture="decoder_only", vocab_size=96, d_model=16, num_heads=2, d_kv=8, d_ff=40, num_decoder_layers=4,
    num_sparse_decoder_layers=2, num_experts=4, dropout_rate=0.0, scan_layers=True,
)  # fmt: skip


@functools.cache
def compiled(model, mesh_config, optimizer="adafactor", devices=None, rows=ROWS, length=LENGTH):
    """A run, and its train step compiled."""
    optimizer = OptimizerConfig(name=optimizer)
    config = ExperimentConfig(model=model, data=DataConfig(batch_size=rows), mesh=mesh_config, optimizer=optimizer)
    run = build_run(config, create_mesh(mesh_config, devices))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(run.mesh))
    names = ("decoder_input_ids", "decoder_attention_mask", "labels")
    return run, compile_train_step(run).lower(run.abstract_state, dict.fromkeys(names, ids)).compile()


def updated_in_place(run, program):
    """Whether every array of the old state is the memory of the new one's, and nothing is gathered for the update itself."""
    text, leaves = program.as_text(), jax.tree.leaves(run.abstract_state)
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", text.split("\n", 1)[0])
    gathers = [c.op_name for c in collectives(text) if c.kind == "all-gather"]
    assert gathers or not run.config.mesh.fsdp
    same = {(int(new), int(old)) for new, old in aliased} == {(i, i) for i in range(len(leaves))}
    return same and all("jvp(" in name for name in gathers)  # the loss and its gradient; the optimiser has no such name


def test_dense_parameters_lie_on_all_devices_of_the_batch_and_experts_on_those_of_the_data_axis():
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    assert partition_spec(("embed", "mlp"), (16, 5), mesh, fsdp=True) == P(("expert", "data"))
    assert partition_spec(("embed", "mlp"), (12, 5), mesh, fsdp=True) == P("data")  # eight do not divide it
    assert partition_spec(("expert", "embed", "mlp"), (4, 16, 5), mesh, fsdp=True) == P("expert", "data")
    assert partition_spec(("embed", "mlp"), (16, 5), create_mesh(MeshConfig(data=8)), fsdp=True) == P("data")
    for spec in (P(("expert", "data"), "model"), P("data", "model")):
        assert without_parts(spec) == P(None, "model")


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_step_gathers_each_layers_parameters_twice_and_hands_gradients_back_in_parts(remat):
    run, program = compiled(MODEL.replace(remat_policy=remat), MeshConfig(data=2, expert=4, fsdp=True))
    found = collectives(program.as_text())
    gathers = [c for c in found if c.kind == "all-gather"]
    # wi of two dense and of two sparse layers, forward and backward, and likewise wo
    dense, expert = 16 * 40 * 4, 16 * 40 * 4
    of_experts = [c for c in gathers if "mlp._routed" in c.op_name]
    assert sum(c.count for c in of_experts) == 2 * 2 * 2 and {c.bytes for c in of_experts} == {expert}
    for kernel in ("mlp/wi/", "mlp/wo/"):
        of_kernel = [c for c in gathers if kernel in c.op_name]
        for ways, size in ((2, dense // 4), (4, dense)):  # over data, then over expert
            stage = [c for c in of_kernel if c.group_size == ways]
            assert sum(c.count for c in stage) == 2 * 2 and {c.bytes for c in stage} == {size}
    scattered = [c for c in found if c.kind == "reduce-scatter"]
    assert sum(c.count for c in scattered) == 2 * 2 and {c.group_size for c in scattered} == {2}  # wi, wo of two layers
    assert sum(c.wire_bytes * c.count for c in gathers) <= 1.1 * parameter_bound(run)["all-gather"]


@pytest.mark.parametrize("optimizer", ["adafactor", pytest.param("adamw", marks=pytest.mark.slow)])
def test_parameters_and_the_optimisers_state_are_updated_where_they_lie_and_that_state_is_never_gathered(optimizer):
    run, program = compiled(MODEL.replace(remat_policy="none"), MeshConfig(data=2, expert=4, fsdp=True), optimizer)
    assert updated_in_place(run, program)
    assert program.memory_analysis().alias_size_in_bytes == device_bytes(run.abstract_state)


@pytest.mark.slow
def test_without_it_every_device_holds_all_and_gathers_nothing():
    run, program = compiled(MODEL, MeshConfig(data=2, expert=4))
    assert updated_in_place(run, program)
    assert not [c for c in collectives(program.as_text()) if c.kind == "all-gather" and "mlp/w" in c.op_name]


def test_a_parameter_in_parts_is_whole_where_it_is_used_and_its_gradient_is_not():
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    x = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
    box = InParts(jnp.asarray(x), P(("expert", "data")), mesh)
    layer = box.replace(value=x[:, 1]).remove_axis(1, {})
    assert layer.spec == P(("expert", "data")) and layer.add_axis(0, {}).spec == P(None, ("expert", "data"))
    assert layer.add_axis(0, {}).remove_axis(0, {}).spec == layer.spec

    def loss(value, dtype):
        return (box.replace(value=value).whole(dtype).astype(jnp.float32) * x).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x, "float32")
    np.testing.assert_allclose(value, (x * x).sum(), rtol=1e-6)
    np.testing.assert_array_equal(gradient, x)
    assert gradient.sharding.spec == P(("expert", "data"))
    rounded = jax.jit(jax.grad(loss), static_argnums=1)(x, "bfloat16")
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, x.astype(jnp.bfloat16).astype(np.float32))


def test_what_is_gathered_is_not_kept_for_the_backward_pass():
    mesh = create_mesh(MeshConfig(data=8))

    def loss(policy):
        def block(value, x):
            return jnp.sin(x @ InParts(value, P("data"), mesh).whole("float32")) ** 2

        return lambda value, x: jax.checkpoint(block, policy=policy)(value, x).sum()

    def gathered_and_kept(policy):
        linear = jax.vjp(loss(policy), jnp.ones((8, 24)), jnp.ones((40, 8)))[1]
        shapes = [leaf.shape for leaf in jax.tree.leaves(linear) if len(leaf.devices()) == 8 and leaf.sharding.is_fully_replicated]
        return (8, 24) in shapes, (40, 24) in shapes

    assert gathered_and_kept(jax.checkpoint_policies.everything_saveable) == (True, True)
    assert gathered_and_kept(keep_all_but_gathered) == (False, True)  # activations are kept, as without recomputation


@pytest.mark.hardware("tpu")
@pytest.mark.parametrize("remat", ["full", "minimal"])
def test_on_a_tpu_topology_a_step_sends_what_it_must(remat):
    model = MODEL.replace(
        dtype="bfloat16", d_model=512, d_ff=2048, d_kv=64, num_heads=8, vocab_size=256, num_decoder_layers=8,
        num_sparse_decoder_layers=4, remat_policy=remat,
    )  # fmt: skip
    devices = compile_devices(parse_topology("v5e:4x4"))
    run, program = compiled(model, MeshConfig(data=4, expert=4, fsdp=True), devices=tuple(devices), rows=32, length=128)
    assert updated_in_place(run, program)
    found = collectives(program.as_text())
    bound, sent = parameter_bound(run), dict.fromkeys(("all-gather", "others"), 0.0)
    for c in found:
        if c.kind != "all-to-all":
            sent["all-gather" if c.kind == "all-gather" else "others"] += c.wire_bytes * c.count
    assert sent["all-gather"] <= 1.1 * bound["all-gather"]
    # XLA joins all-reduces as small as here and slices what they give; of larger ones it makes reduce-scatters
    assert sent["others"] <= 1.7 * bound["reduce-scatter"]
