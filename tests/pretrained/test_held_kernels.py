"""Quantised kernels held in memory as float32, where a CPU multiplies faster by them: the numbers, the files and the choice."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_tensors import assert_same

import flax_switch as fs
from flax_switch.commands.checkpoints import add_loading_arguments, loading_options
from flax_switch.config import MeshConfig
from flax_switch.config.weights import SCALE
from flax_switch.convert.canonical import canonical_shapes, flatten
from flax_switch.convert.quantize import dequantized
from flax_switch.convert.tensors import from_array
from flax_switch.ops.kernels import quantized as kernels
from flax_switch.parallel.mesh import create_mesh

CONFIG = fs.SwitchConfig(
    vocab_size=96, d_model=64, num_heads=2, d_kv=32, d_ff=128, num_encoder_layers=2, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3, init_scale=1.0, capacity_mode="dropless",
    mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False,
)  # fmt: skip
INTEGERS = ("int8", "int4")
IDS = np.random.default_rng(0).integers(3, 96, (3, 12))


@pytest.fixture(scope="module")
def floats():
    return fs.Pretrained(CONFIG, fs.SwitchTransformer(CONFIG), fs.init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def held(floats):
    """{weights: {how: the model}}"""
    return {w: {how: fs.quantize(floats, w, kernels=how) for how in ("integers", "floats", "auto")} for w in INTEGERS}


def dtypes(model):
    """What the kernels that have scales are held as."""
    flat = flatten(model.params)
    return {path.removesuffix(SCALE): flat[path.removesuffix(SCALE)].dtype.name for path in flat if path.endswith(SCALE)}


@pytest.mark.parametrize("weights", INTEGERS)
def test_it_is_to_the_bit_the_float_model_that_the_integers_mean(held, floats, weights):
    integers, as_floats = held[weights]["integers"], held[weights]["floats"]
    tensors = {path: from_array(leaf) for path, leaf in flatten(integers.params).items()}
    meant = {path: tensor.numpy() for path, tensor in dequantized(integers.config, "full", tensors)[1].items()}
    assert meant.keys() == canonical_shapes(CONFIG).keys()
    flat = flatten(as_floats.params)
    assert_same(meant, {path: flat[path] for path in meant})
    whole = floats.replace(
        params=jax.tree.map_with_path(lambda path, _: jnp.asarray(meant["/".join(k.key for k in path)]), floats.params)
    )
    np.testing.assert_array_equal(*(m(IDS, decoder_input_ids=IDS[:, :6]).logits for m in (as_floats, whole)))


@pytest.mark.parametrize("weights", INTEGERS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_it_is_saved_and_read_back_as_the_integers_that_it_was_made_of(held, floats, weights, scan_layers, tmp_path):
    floats.save_pretrained(tmp_path / "floats", format="flax_switch")
    load = lambda path, how: fs.load_pretrained(path, scan_layers=scan_layers, kernels=how)  # noqa: E731
    small = fs.load_pretrained(tmp_path / "floats", weights=weights, scan_layers=scan_layers, kernels="floats")
    assert set(dtypes(small).values()) == {"float32"}
    small.save_pretrained(tmp_path / "small", format="flax_switch")
    stored = fs.load_pretrained(tmp_path / "small", scan_layers=False, kernels="integers")
    assert_same(stored.params, held[weights]["integers"].params)
    again = load(tmp_path / "small", "floats")
    assert_same(again.params, small.params)
    assert again.config == small.config


def test_a_kernel_that_was_changed_is_not_written(held, tmp_path):
    for weights in INTEGERS:
        changed = jax.tree.map(lambda leaf: leaf, held[weights]["floats"].params)
        kernel = changed["encoder"]["layers_0"]["mlp"]["wi_0"]
        kernel["kernel"] = kernel["kernel"].at[3, 5].mul(1.01)
        with pytest.raises(fs.CheckpointError, match="encoder/layers_0/mlp/wi_0/kernel holds numbers that are not integers times"):
            fs.save_pretrained(tmp_path / weights, held[weights]["floats"].config, changed, format="flax_switch")
        assert not (tmp_path / weights).exists() or not list((tmp_path / weights).glob("*.json"))


def test_each_kernel_is_held_as_its_size_says_and_a_name_is_obeyed(floats, held, monkeypatch, tmp_path, caplog):
    for weights in INTEGERS:
        assert not {"float32"} & set(dtypes(held[weights]["integers"]).values())
        assert set(dtypes(held[weights]["floats"]).values()) == set(dtypes(held[weights]["auto"]).values()) == {"float32"}
    monkeypatch.setattr(kernels, "FEW_WEIGHTS", 64 * 64)
    with caplog.at_level("INFO", "flax_switch"):
        some = fs.quantize(floats, "int8")
    shapes = canonical_shapes(CONFIG)
    assert dtypes(some) == {
        path: "float32" if np.prod(shapes[path][-2:]) <= 64 * 64 else "int8" for path in dtypes(held["int8"]["integers"])
    }
    assert set(dtypes(some).values()) == {"float32", "int8"}
    count = list(dtypes(some).values()).count("float32")
    assert f"{count} of {len(dtypes(some))} quantised kernels are held as float32" in caplog.text
    assert f"{len(dtypes(some)) - count} held as integers, {count} as float32" in repr(some) and "held as" not in repr(floats)
    some.save_pretrained(tmp_path, format="flax_switch")
    assert_same(fs.load_pretrained(tmp_path, kernels="integers").params, held["int8"]["integers"].params)


def test_only_one_cpu_is_given_floats_by_itself(floats, tmp_path, monkeypatch):
    floats.save_pretrained(tmp_path, format="flax_switch")
    mesh = create_mesh(MeshConfig(data=8))
    assert "float32" not in dtypes(fs.load_pretrained(tmp_path, weights="int8", mesh=mesh)).values()
    with pytest.raises(fs.ConfigError, match="kernels='floats' is for one device"):
        fs.load_pretrained(tmp_path, weights="int8", mesh=mesh, kernels="floats")
    monkeypatch.setattr(kernels, "jax", SimpleNamespace(default_backend=lambda: "gpu"))
    assert not kernels.faster_as_floats((8, 8))


def test_a_name_that_says_nothing_is_refused(floats):
    with pytest.raises(fs.ConfigError, match="kernels must be one of 'auto', 'integers', 'floats'.*Did you mean 'floats'"):
        fs.quantize(floats, "int8", kernels="float")
    with pytest.raises(fs.ConfigError, match="kernels='integers' says how int8 or int4 kernels are held"):
        fs.quantize(floats, "bfloat16", kernels="integers")


def test_experts_on_disk_are_the_same_floats(held, tmp_path):
    small = held["int8"]["auto"]
    small.save_pretrained(tmp_path, format="flax_switch")
    on_disk = fs.load_pretrained(tmp_path, experts="disk", expert_memory="1MB")
    np.testing.assert_array_equal(on_disk.encode(IDS).last_hidden_state, small.encode(IDS).last_hidden_state)


def test_rounded_rows_say_nearly_the_same(held):
    exact, rounded = (np.asarray(held["int8"][how](IDS, decoder_input_ids=IDS[:, :6]).logits) for how in ("floats", "integers"))
    assert 0 < np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_commands_pass_the_name_on():
    import argparse

    parser = argparse.ArgumentParser()
    add_loading_arguments(parser)
    assert loading_options(parser.parse_args([]))["kernels"] == "auto"
    assert loading_options(parser.parse_args(["--kernels", "integers"]))["kernels"] == "integers"
