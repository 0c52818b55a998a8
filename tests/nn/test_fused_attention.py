"""Models whose attention is fused: the same losses and gradients as the plain form, and no array of queries and keys."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels import fused_attention_blocks
from flax_switch.ops.kernels.fused_attention_blocks import Tiles
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.placement import placed_on
from flax_switch.plan.memory import batch_structs
from flax_switch.plan.topology import compile_devices, parse_topology
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

MODEL = SwitchConfig(
    vocab_size=50, d_model=12, num_heads=2, d_kv=6, d_ff=20, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, num_experts=4, init_scale=1.0,
)  # fmt: skip
DECODER = dict(architecture="decoder_only", num_sparse_decoder_layers=0)
MODELS = {
    "encoder and decoder, packed": {},
    "parallel layers with tables of their own, scanned, prefixes": dict(
        **DECODER, layer_form="parallel", relative_attention_per_layer=True, num_decoder_layers=2, scan_layers=True,
        bidirectional_inputs=True, remat_policy="minimal",
    ),
    "fused layers, one key for all heads, rotary": dict(
        **DECODER, layer_form="fused", positions="rotary", scale_attention_logits=True, zero_padding_activations=False
    ),
}  # fmt: skip
B, S, L = 4, 37, 21


@pytest.fixture(autouse=True)
def small_blocks():
    with mock.patch.object(fused_attention_blocks, "BLOCK", 16):
        yield


def batch(config):
    rng = np.random.default_rng(0)
    ids = {"input_ids": rng.integers(1, 50, (B, S)), "decoder_input_ids": rng.integers(1, 50, (B, L))}
    masks = {
        "attention_mask": np.arange(S) < rng.integers(9, S, (B, 1)),
        "decoder_attention_mask": np.arange(L) < rng.integers(5, L, (B, 1)),
    }
    segments = {
        name: np.sort(rng.integers(0, 3, ids.shape))
        for name, ids in zip(("segment_ids", "decoder_segment_ids"), ids.values(), strict=True)
    }
    if not config.decoder_only:
        return ids | masks | segments
    only = {name: x for name, x in (ids | masks | segments).items() if name.startswith("decoder")}
    return only | ({"prefix_mask": np.arange(L) < rng.integers(2, 9, (B, 1))} if config.bidirectional_inputs else {})


def loss_and_gradients(config, mesh=None):
    """Of a weighting of the logits, with dropout."""
    model = SwitchTransformer(config) if mesh is None else SwitchTransformer(config, devices=placed_on(mesh))
    params = init_params(SwitchTransformer(config), jax.random.key(1))

    def loss(params):
        output = model.apply({"params": params}, **batch(config), deterministic=False, rngs={"dropout": jax.random.key(2)})
        return (jax.nn.log_softmax(output.logits) * jnp.cos(jnp.arange(50.0))[None, None]).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), got[1], want[1])


@pytest.mark.parametrize("name", [next(iter(MODELS)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])])
def test_loss_and_gradients_are_those_of_plain_attention(name):
    config = MODEL.replace(**MODELS[name])
    fused, plain = (loss_and_gradients(config.replace(attention_implementation=form)) for form in ("fused", "plain"))
    assert_equal(fused, plain)
    tables = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1]) if "rel_embedding" in jax.tree_util.keystr(path)]
    assert len(tables) == {"relative": 2 - config.decoder_only, "rotary": 0}[config.positions]
    assert all(float(jnp.abs(table).max()) > 0 for table in tables)


@pytest.mark.slow
def test_over_a_mesh_each_device_has_its_rows_and_heads():
    config = MODEL.replace(attention_implementation="fused")
    mesh = create_mesh(MeshConfig(data=2, expert=1, model=2), jax.devices()[:4])
    assert_equal(loss_and_gradients(config, mesh), loss_and_gradients(config))


def step_text(form):
    """A train step as it is handed to the compiler."""
    config = ExperimentConfig(
        model=MODEL.replace(attention_implementation=form),
        data=DataConfig(batch_size=3, inputs_length=76, targets_length=58),
        optimizer=OptimizerConfig(),
    )
    run = build_run(config, create_mesh(config.mesh, jax.devices()[:1]))
    return compile_train_step(run).lower(run.abstract_state, batch_structs(config, run.mesh)).as_text()


def pairs(text):
    """The shapes with two axes of lengths, as they are or filled up to blocks."""
    lengths = {size for length in (76, 58) for size in (length, filled(length))}
    shapes = {tuple(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"tensor<((?:\d+x)+)", text)}
    return {shape for shape in shapes if sum(size in lengths for size in shape) >= 2}


def filled(length):
    cut: Tiles = fused_attention_blocks.tiles(length, 16)
    return cut.size * cut.count


def test_no_array_of_a_train_step_has_the_axes_of_queries_and_keys():
    assert {(3, 2, 76, 76), (3, 2, 58, 58), (3, 2, 58, 76), (1, 2, 76, 76), (3, 1, 58, 58)} <= pairs(step_text("plain"))
    assert pairs(step_text("fused")) == set()


@pytest.mark.hardware("tpu")
def test_on_a_tpu_topology_each_chip_runs_the_kernels_on_its_rows_and_heads():
    config = ExperimentConfig(
        model=MODEL.replace(
            attention_implementation="fused", d_model=128, d_kv=64, d_ff=256, num_sparse_encoder_layers=1, dtype="bfloat16"
        ),
        data=DataConfig(batch_size=16, inputs_length=1100, targets_length=700),
        optimizer=OptimizerConfig(),
        mesh=MeshConfig(data=2, expert=4, model=2),
    )
    run = build_run(config, create_mesh(config.mesh, compile_devices(parse_topology("v5e:4x4"))))
    text = compile_train_step(run).lower(run.abstract_state, batch_structs(config, run.mesh)).compile().as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line and "fused_attention" in line]
    assert len(kernels) == 2 * 3  # of the encoder, of the decoder and between them, forward and backward
    assert "bf16[2,1,64,1152]" in text  # features before positions, filled up to whole blocks, of two rows and one head
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d[\d,]*)\]", text)}
    assert not [shape for shape in shapes if sum(size in (1100, 1152, 700, 768) for size in shape) > 1]
