"""A loaded model knows several adapters, uses one at a time, and generates what the model with that one in its kernels does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_adapters import drawn

import flax_switch as fs
from flax_switch.config import ConfigError, MeshConfig
from flax_switch.convert import CheckpointError
from flax_switch.generation.program import run_program
from flax_switch.parallel.mesh import create_mesh

CONFIG = fs.SwitchConfig(
    vocab_size=64, d_model=64, num_heads=2, d_kv=32, d_ff=64, num_encoder_layers=2, num_decoder_layers=2, num_experts=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_selected_experts=2, init_scale=1.0,
)  # fmt: skip
IDS = [[5, 6, 7, 9], [8, 9, 10, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    params = fs.init_params(CONFIG, jax.random.key(0))
    return fs.save_pretrained(tmp_path_factory.mktemp("model") / "model", CONFIG, params, format="flax_switch")


@pytest.fixture(scope="module")
def model(folder):
    return fs.load_pretrained(folder)


def logits(model):
    return np.asarray(model(input_ids=IDS, decoder_input_ids=IDS).logits)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("scanned", [False, True], ids=["", "scanned"])
def test_merged_is_unmerged_and_so_is_what_is_generated(folder, dora, scanned):
    base = fs.load_pretrained(folder, scan_layers=scanned, encoder_sparse_layers=(1,), decoder_sparse_layers=(1,))
    model = base.with_adapter(drawn(base, 1, use_dora=dora))
    merged = model.merge_adapter()
    assert np.abs(logits(model) - logits(base)).max() > 0.1
    np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    for controls in (dict(), dict(num_beams=3)):
        one, other = (m.generate(IDS, max_new_tokens=6, **controls).sequences for m in (model, merged))
        np.testing.assert_array_equal(one, other)
    assert merged.adapter is None and not merged.adapters
    jax.tree.map(np.testing.assert_array_equal, model.use_adapter(None).params, base.params)


def test_several_adapters_share_the_parameters_and_one_program(model):
    both = model.with_adapter({"one": drawn(model, 1), "two": drawn(model, 2)})
    assert both.adapter == "two"
    expected = {name: model.with_adapter(drawn(model, seed)) for name, seed in (("one", 1), ("two", 2))}
    both.generate(IDS, max_new_tokens=5)
    compiled = run_program._cache_size()
    for name, alone in expected.items():
        np.testing.assert_array_equal(
            both.generate(IDS, max_new_tokens=5, adapter=name).sequences, alone.generate(IDS, max_new_tokens=5).sequences
        )
        assert run_program._cache_size() == compiled
        np.testing.assert_array_equal(logits(both.use_adapter(name)), logits(alone))
    assert np.abs(logits(expected["one"]) - logits(expected["two"])).max() > 0.1
    path = ("encoder", "layers_0", "attention", "query", "kernel")
    kernel = lambda m: functools.reduce(dict.__getitem__, path, m.params)  # noqa: E731
    assert kernel(both).base is kernel(model)
    assert "adapter     two, of one, two" in repr(both)
    with pytest.raises(ConfigError, match="adapter must be one of 'one', 'two'; it is 'tow'"):
        both.generate(IDS, adapter="tow")


def test_a_folder_of_ours_gives_back_every_bit_and_what_it_was_trained_on(model, tmp_path):
    adapter = drawn(model, 1, use_dora=True)
    path = next(iter(adapter.kernels))
    other = dataclasses.replace(adapter.kernels[path], alphas=(3.0,))
    adapter = dataclasses.replace(adapter, kernels={**adapter.kernels, path: other})
    model.with_adapter(adapter).save_adapter(tmp_path / "saved", format="flax_switch")
    again = fs.load_adapter(tmp_path / "saved", model)
    assert (again.config, again.base, again.fingerprint) == (adapter.config, adapter.base, adapter.fingerprint)
    assert again.kernels == adapter.kernels and again.scales(path) == 0.75
    assert again.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
def test_a_rounded_model_has_the_adapter_beside_it(model, weights):
    rounded = fs.quantize(model, weights)
    adapter = drawn(model, 1)
    found, floats = rounded.with_adapter(adapter), model.with_adapter(adapter)
    change, wanted = logits(found) - logits(rounded), logits(floats) - logits(model)
    assert np.linalg.norm(change - wanted) < (0.5 if weights == "int4" else 0.1) * np.linalg.norm(wanted)
    assert found.generate(IDS, max_new_tokens=4).sequences.shape[0] == 2
    if weights == "bfloat16":
        assert found.merge_adapter().params["encoder"]["layers_0"]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    else:
        with pytest.raises(ConfigError, match=f"cannot be merged into {weights} weights"):
            found.merge_adapter()


def test_on_a_mesh_it_generates_what_it_does_on_one_device(folder, model):
    mesh = create_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])
    spread = fs.load_pretrained(folder, mesh=mesh).with_adapter(drawn(model, 1))
    alone = model.with_adapter(drawn(model, 1))
    np.testing.assert_array_equal(spread.generate(IDS, max_new_tokens=5).sequences, alone.generate(IDS, max_new_tokens=5).sequences)
    np.testing.assert_allclose(logits(spread.merge_adapter()), logits(alone), atol=1e-4)


def test_with_experts_on_disk_attention_may_have_an_adapter_and_experts_not(folder, model):
    on_disk = fs.load_pretrained(folder, experts="disk")
    adapter = drawn(model, 1, targets="attention")
    one, other = (m.with_adapter(adapter).generate(IDS, max_new_tokens=4).sequences for m in (on_disk, model))
    np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="has a part for .*expert.* this model's experts are on disk"):
        on_disk.with_adapter(drawn(model, 1))


def test_another_models_adapter_is_refused_before_anything_is_computed(model, tmp_path):
    model.with_adapter(drawn(model, 1)).save_adapter(tmp_path / "saved", format="flax_switch")
    other = model.replace(params=fs.init_params(CONFIG, jax.random.key(1)))
    with pytest.raises(CheckpointError, match="is an adapter of another model, its base: its shapes fit, but the embeddings"):
        other.with_adapter(tmp_path / "saved")
    small = CONFIG.replace(d_ff=32, num_decoder_layers=1)
    smaller = fs.Pretrained(small, fs.SwitchTransformer(small), fs.init_params(small, jax.random.key(0)))
    unfit = (
        r"model \(it was trained on its base\): 13 left over: .*decoder/layers_1/.*4 of the wrong shape: .*wi/kernel/b is \[4, 64\]"
    )
    with pytest.raises(CheckpointError, match=unfit):
        smaller.with_adapter(tmp_path / "saved")


def test_what_is_asked_of_a_model_without_an_adapter_is_named(model, tmp_path):
    with pytest.raises(ConfigError, match="No adapter is in use"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter must be of type Adapter; it is of type int"):
        model.with_adapter(3)
    with pytest.raises(ConfigError, match=r"has an adapter in use, which would be lost: .* merge_adapter\(\)"):
        model.with_adapter(drawn(model, 1)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="format must be one of 'peft', 'flax_switch'"):
        model.with_adapter(drawn(model, 1)).save_adapter(tmp_path / "saved", format="pfet")


def test_a_decoder_alone_has_an_adapter_for_which_peft_has_no_names(tmp_path):
    config = CONFIG.replace(architecture="decoder_only", num_encoder_layers=0, num_sparse_encoder_layers=0)
    base = fs.Pretrained(config, fs.SwitchTransformer(config), fs.init_params(config, jax.random.key(0)))
    model = base.with_adapter(drawn(base, 1))
    said = lambda model: model.generate(IDS, max_new_tokens=4).sequences  # noqa: E731
    np.testing.assert_array_equal(said(model), said(model.merge_adapter()))
    model.save_adapter(tmp_path / "saved", format="flax_switch")
    np.testing.assert_array_equal(said(base.with_adapter(tmp_path / "saved")), said(model))
    with pytest.raises(ConfigError, match="architecture='decoder_only' .* keep it in the format 'flax_switch'"):
        model.save_adapter(tmp_path / "peft")


def test_what_an_adapters_tasks_had_before_inputs_goes_with_it(model, tmp_path):
    adapter = dataclasses.replace(drawn(model, 1), prefixes=("first: ",))
    model.with_adapter(adapter).save_adapter(tmp_path / "saved", format="flax_switch")
    again = fs.load_adapter(tmp_path / "saved", model)
    assert again.prefixes == ("first: ",)
    assert model.with_adapter(again).merge_adapter().prefixes == ("first: ",)
