"""Models with int8 and int4 kernels: loaded, saved, run everywhere, and refused where they cannot go."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_tensors import assert_same

import flax_switch as fs
from flax_switch.cli import main
from flax_switch.config import EXECUTORS, ExperimentConfig, MeshConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe
from flax_switch.convert.canonical import canonical_shapes, flatten, parameters_of
from flax_switch.convert.checkpoint import convert, open_checkpoint
from flax_switch.convert.quantize import dequantized, quantized
from flax_switch.convert.tensors import LazyTensor, abstract, from_array
from flax_switch.nn.init import logical_axes
from flax_switch.ops.kernels import quantized as kernels
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.placement import placed_on
from flax_switch.workflows.finetune import finetune

CONFIG = fs.SwitchConfig(
    vocab_size=96, d_model=64, num_heads=2, d_kv=32, d_ff=128, num_encoder_layers=2, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, init_scale=1.0, capacity_mode="dropless",
)  # fmt: skip
RICH = dict(
    num_selected_experts=2, mlp_activations=("gelu_new", "linear"), shared_expert=True, extra_mlp=True, tie_word_embeddings=False
)
INTEGERS = ("int8", "int4")
IDS = np.random.default_rng(0).integers(3, 96, (4, 16))
TARGET = np.random.default_rng(1).integers(3, 96, (4, 9))


def model(config=CONFIG):
    return fs.Pretrained(config, fs.SwitchTransformer(config), fs.init_params(config, jax.random.key(0)))


def logits(pretrained, **placement):
    run = jax.jit(pretrained.model.clone(**placement).apply)
    return np.asarray(run({"params": pretrained.params}, IDS, TARGET).logits)


def floats_of(pretrained):
    """The float model that a quantised one computes with."""
    shapes = canonical_shapes(pretrained.config)
    tensors = {path: from_array(leaf) for path, leaf in flatten(pretrained.params).items() if path in shapes}
    config, tensors = dequantized(pretrained.config, "full", tensors)
    whole = model(config)
    return whole.replace(
        params=jax.tree.map_with_path(lambda path, _: tensors["/".join(k.key for k in path)].numpy(), whole.params)
    )


@pytest.fixture(scope="module")
def tied():
    return model()


@pytest.fixture(autouse=True)
def as_wide_models(monkeypatch):
    """Kernels are held as integers, as those of wide models are; `test_held_kernels.py` is about the others."""
    monkeypatch.setattr(kernels, "FEW_WEIGHTS", 0)


@pytest.fixture
def exact_rows(monkeypatch):
    """Products of rows that are not rounded, on a CPU too."""
    monkeypatch.setitem(kernels.DEFAULT, "cpu", "dequantized")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("weights", INTEGERS)
def test_kernels_are_integers_and_embeddings_norms_biases_and_routers_stay_as_they_are(tied, weights):
    params = flatten(fs.quantize(tied, weights).params)
    for path, leaf in flatten(tied.params).items():
        if "/router/" in path or not path.endswith("kernel"):
            assert params[path] is not None and params[path].dtype == leaf.dtype, path
            np.testing.assert_array_equal(params[path], leaf)
        else:
            attention, projection = path.split("/")[-3:-1]
            finer = {"attention": ("value", "out"), "encoder_decoder_attention": ("query", "value", "out")}
            packed = weights == "int4" and projection not in finer.get(attention, ())
            assert params[path].dtype == (np.uint8 if packed else np.int8), path
            assert params[path + "_scale"].dtype == ("bfloat16" if packed else np.float32)
    assert params["decoder/logits_dense/kernel"].dtype == np.int8  # the tied head's copy, which only memory holds


@pytest.mark.parametrize("weights", INTEGERS)
def test_a_weight_is_off_by_at_most_half_a_step_and_the_largest_by_nothing(weights):
    kernel = np.random.default_rng(0).normal(size=(3, 128, 64)).astype(np.float32)
    kernel[1, :, 7] = 0
    config = CONFIG.replace(num_experts=3, d_ff=128, weights=weights)
    path = "encoder/layers_1/mlp/expert/wo/kernel"
    tensors = quantized(config, {path: from_array(kernel)})
    scale = np.abs(np.float32(tensors[path + "_scale"].numpy()))
    step = np.repeat(scale, {"int8": 128, "int4": 64}[weights], axis=-1).reshape(3, 64, 128).swapaxes(1, 2)
    back = dequantized(config, "encoder", tensors)[1][path].numpy()
    # int4's number opposite to the largest may be cut by half a step more, and its scales are off by 1 in 512
    clipped = step * (1.02 if weights == "int4" else 0.5)
    assert (np.abs(back - kernel) <= np.maximum(clipped, 1e-30) * 1.0001).all()
    assert (np.abs(back - kernel) <= step * 0.5001).mean() > 0.99
    groups = kernel.reshape(3, -1, {"int8": 128, "int4": 64}[weights], 64)
    largest = np.abs(groups).argmax(2)[:, :, None]
    rounded = {"int8": 1e-6, "int4": 2**-8}[weights]  # of the scale
    np.testing.assert_allclose(*(np.take_along_axis(x.reshape(groups.shape), largest, 2) for x in (back, kernel)), rtol=rounded)
    assert (back[1, :, 7] == 0).all()
    lazy = dequantized(config, "encoder", tensors)[1][path]
    for inputs, outputs in ((slice(70, 100), slice(3, 20)), (slice(0, 64), slice(0, 64)), (slice(63, 65), slice(60, 64))):
        np.testing.assert_array_equal(lazy.read((slice(1, 3), inputs, outputs)), back[1:3, inputs, outputs])


@pytest.mark.parametrize(
    ("weights", "changes"), [("int8", {}), ("int8", RICH), ("int4", RICH)], ids=["int8, tied", "int8, gated", "int4, gated"]
)
def test_every_executor_computes_the_float_model_that_the_integers_mean(changes, weights, exact_rows):
    small = fs.quantize(model(CONFIG.replace(**changes)), weights)
    want = logits(floats_of(small))
    if not changes:  # the copied head is rounded as well
        head = quantized(
            small.config, {"decoder/logits_dense/kernel": from_array(np.asarray(small.params["token_embedder"]["embedding"]).T)}
        )
        whole = floats_of(small)
        untied = whole.config.replace(tie_word_embeddings=False)
        made = dequantized(small.config.replace(tie_word_embeddings=False), "full", head)[1]["decoder/logits_dense/kernel"].numpy()
        decoder = {**whole.params["decoder"], "logits_dense": {"kernel": made * CONFIG.d_model**-0.5}}
        want = logits(fs.Pretrained(untied, fs.SwitchTransformer(untied), {**whole.params, "decoder": decoder}))
    for executor in EXECUTORS:
        config = small.config.replace(moe_executor=executor)
        got = logits(small.replace(config=config, model=fs.SwitchTransformer(config)))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=executor)


def test_rows_rounded_to_8_bits_change_every_executors_logits_alike_and_little(tied):
    small = fs.quantize(tied, "int8")
    every = []
    for executor in EXECUTORS:
        config = small.config.replace(moe_executor=executor)
        every.append(logits(small.replace(config=config, model=fs.SwitchTransformer(config))))
    want = logits(tied)
    for got in every:
        np.testing.assert_allclose(got, every[0], rtol=1e-4, atol=1e-4 * np.abs(want).max())
    error = np.linalg.norm(every[0] - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.quantile(error, 0.8) < 0.03  # what was rounded may send a token to another expert


@pytest.mark.parametrize("weights", INTEGERS)
@pytest.mark.parametrize("changes", [{}, RICH], ids=["tied", "gated, with a head"])
def test_a_saved_model_is_read_back_to_the_bit(tmp_path, weights, changes):
    small = fs.quantize(model(CONFIG.replace(**changes)), weights)
    small.save_pretrained(tmp_path / "small", format="flax_switch", max_shard_size="40KB")
    assert json.loads((tmp_path / "small" / "flax_switch.json").read_text())["config"]["weights"] == weights
    assert "decoder/logits_dense/kernel" in open_checkpoint(tmp_path / "small").tensors or not changes
    again = fs.load_pretrained(tmp_path / "small")
    assert again.config == small.config
    assert_same(again.params, small.params)
    copied = convert(tmp_path / "small", tmp_path / "copy", to="flax_switch")
    assert_same(fs.load_pretrained(copied).params, small.params)


@pytest.mark.parametrize("weights", [*INTEGERS, "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["huggingface", "flax_switch"])
def test_loading_a_float_checkpoint_quantised_is_quantising_the_loaded_model(tmp_path, tied, format, weights):
    tied.save_pretrained(tmp_path, format=format)
    want = fs.quantize(fs.load_pretrained(tmp_path), weights)
    assert_same(fs.load_pretrained(tmp_path, weights=weights).params, want.params)
    written = convert(tmp_path, tmp_path / "small", to="flax_switch", changes={"weights": weights})
    assert_same(fs.load_pretrained(written).params, want.params)
    assert want.config.dtype == "float32" and logits(want).dtype == np.float32


@pytest.mark.parametrize("weights", INTEGERS)
def test_a_scanned_model_has_the_same_integers_and_tokens(tied, weights, tmp_path):
    tied.save_pretrained(tmp_path, format="flax_switch")
    plain = fs.load_pretrained(tmp_path, weights=weights)
    scanned = fs.load_pretrained(tmp_path, weights=weights, scan_layers=True)
    np.testing.assert_allclose(logits(scanned), logits(plain), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(*(m.generate(IDS, max_new_tokens=6).sequences for m in (scanned, plain)))
    assert_same(fs.quantize(fs.load_pretrained(tmp_path, scan_layers=True), weights).params, scanned.params)
    scanned.save_pretrained(tmp_path / "again", format="flax_switch")
    assert_same(fs.load_pretrained(tmp_path / "again", scan_layers=False).params, plain.params)


@pytest.mark.parametrize("weights", INTEGERS)
def test_an_encoder_alone_is_quantised_without_a_head(tied, weights):
    alone = fs.Pretrained(
        CONFIG, fs.SwitchEncoder(CONFIG), {k: v for k, v in tied.params.items() if k != "decoder"}, architecture="encoder"
    )
    small = fs.quantize(alone, weights)
    want = fs.quantize(tied, weights)
    assert not any("logits_dense" in path for path in flatten(small.params))
    np.testing.assert_allclose(small.encode(IDS).last_hidden_state, want.encode(IDS).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weights", "capacity_mode"), [("int8", "dropless"), ("int4", "factor")])
def test_on_a_mesh_it_says_what_it_says_on_one_device(tmp_path, weights, capacity_mode):
    one = fs.quantize(model(CONFIG.replace(capacity_mode=capacity_mode, d_ff=192)), weights)
    one.save_pretrained(tmp_path, format="flax_switch")
    mesh = create_mesh(MeshConfig(data=2, expert=2, model=2))
    several = fs.load_pretrained(tmp_path, mesh=mesh)
    expert = several.params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    assert expert["kernel"].sharding.spec[0] == expert["kernel_scale"].sharding.spec[0] == "expert"
    want = logits(one)
    got = logits(several, devices=placed_on(mesh))
    # A device that has half of a hidden row rounds it to 8 bits by a scale of its own.
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    tokens = [m.generate(IDS, max_new_tokens=4).sequences for m in (several, one)]
    np.testing.assert_array_equal(*tokens)
    assert_same(several.params, one.params)


@pytest.mark.parametrize("weights", INTEGERS)
def test_quantising_a_model_that_lies_on_a_mesh_leaves_it_there(tied, tmp_path, weights):
    tied.save_pretrained(tmp_path, format="flax_switch")
    mesh = create_mesh(MeshConfig(data=4, expert=2))
    small = fs.quantize(fs.load_pretrained(tmp_path, mesh=mesh), weights)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(small.params))
    assert_same(small.params, fs.quantize(tied, weights).params)


@pytest.mark.parametrize("weights", INTEGERS)
def test_cached_decoding_says_what_the_whole_model_says(tied, weights):
    small = fs.quantize(tied, weights)
    output = small.generate(IDS, max_new_tokens=6, min_new_tokens=6, output_scores=True, routing="as_trained")
    whole = small(IDS, decoder_input_ids=output.sequences).logits
    np.testing.assert_allclose(output.step_scores.swapaxes(0, 1)[:, :, 2:], whole[:, :6, 2:], rtol=1e-3, atol=1e-3)
    controls = dict(num_beams=3) if weights == "int8" else dict(do_sample=True, top_k=5)
    assert small.generate(IDS, max_new_tokens=4, **controls).sequences.shape[0] == 4


def test_an_export_to_hugging_face_has_the_numbers_that_the_integers_mean_and_says_so(tied, tmp_path, caplog):
    small = fs.quantize(tied, "int8")
    with caplog.at_level("INFO", "flax_switch"):
        small.save_pretrained(tmp_path / "theirs")
    assert "int8" in caplog.text
    theirs, want = fs.load_pretrained(tmp_path / "theirs"), floats_of(small)
    assert_same(theirs.params, want.params)
    assert theirs.config.weights == "float"


def test_base_8s_file_has_a_quarter_and_a_seventh_of_the_bytes():
    """Counted from shapes; 25 M of the 619 M parameters are embeddings, which stay float."""
    config = PRESETS["switch-base-8"]
    tensors = {path: abstract(shape) for path, shape in canonical_shapes(config).items()}
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors.values())  # noqa: E731
    for weights, share, narrow in (("int8", 0.29, 0.265), ("int4", 0.18, 0.155)):
        stored = quantized(config.replace(weights=weights), tensors)
        assert {path: tensor.shape for path, tensor in stored.items()} == canonical_shapes(config.replace(weights=weights))
        assert size(stored) <= share * size(tensors)
        embeddings = tensors["token_embedder/embedding"].nbytes
        assert size(stored) - embeddings / 2 <= narrow * size(tensors)
        counts = sum(parameters_of(path, tensor.shape, tensor.dtype) for path, tensor in stored.items())
        assert counts == sum(parameters_of(path, tensor.shape, tensor.dtype) for path, tensor in tensors.items())


def test_a_decoder_alone_keeps_values_and_outputs_of_its_attention_in_8_bits():
    alone = {"architecture": "decoder_only", "num_decoder_layers": 2, "num_sparse_decoder_layers": 1}
    shapes = canonical_shapes(PRESETS["switch-tiny"].replace(weights="int4", **alone))
    packed = {
        path.split("/")[-2] for path in shapes if "attention" in path and f"{path}_scale" in shapes and shapes[path][-1] == 32
    }
    assert packed == {"query", "key"}, sorted(shapes)


def test_experts_are_read_one_at_a_time_however_many_there_are():
    read = []

    def block(index):
        read.append(tuple(s.stop - s.start for s in index))
        return np.ones(read[-1], np.float32)

    config = CONFIG.replace(weights="int8", num_experts=6)
    tensor = LazyTensor((6, 64, 128), np.dtype(np.float32), block)
    quantized(config, {"encoder/layers_1/mlp/expert/wi/kernel": tensor})["encoder/layers_1/mlp/expert/wi/kernel"].numpy()
    assert max(shape[0] for shape in read) == 1


def test_what_a_quantised_model_cannot_do_is_refused_by_name(tied, tmp_path, monkeypatch):
    small = fs.quantize(tied, "int8")
    monkeypatch.setattr("flax_switch.workflows.finetune.open_start", lambda *_: SimpleNamespace(config=small.config))
    small.save_pretrained(tmp_path / "small", format="flax_switch")
    for again in INTEGERS:
        with pytest.raises(fs.ConfigError, match="has int8 weights already"):
            fs.quantize(small, again)
        with pytest.raises(fs.ConfigError, match="has int8 weights already"):
            fs.load_pretrained(tmp_path / "small", weights=again)
    with pytest.raises(fs.ConfigError, match="weights must be one of 'int8', 'int4'.*Did you mean 'int8'"):
        fs.quantize(tied, "int9")
    with pytest.raises(fs.ConfigError, match="multiple of 64.*d_model; it is 48"):
        fs.quantize(model(CONFIG.replace(d_model=48)), "int4")
    state = fs.TrainState(jnp.zeros((), jnp.int32), small.params, (), jax.random.key_data(jax.random.key(0)))
    for training in (
        lambda: fs.init_params(small.config, jax.random.key(0)),
        lambda: fs.train_step(small.config, fs.optimizer(small.config), state, {"input_ids": IDS, "labels": TARGET}),
        lambda: ExperimentConfig(model=small.config),
        lambda: finetune(load_recipe("finetune_summarization"), tmp_path / "run", init="small"),
    ):
        with pytest.raises(fs.ConfigError, match="int8 weights cannot be trained"):
            training()
    broken = jax.tree.map(lambda leaf: leaf, tied.params)
    broken["encoder"]["layers_0"]["mlp"]["wi"]["kernel"] = jnp.full((64, 128), jnp.nan)
    with pytest.raises(fs.CheckpointError, match="encoder/layers_0/mlp/wi/kernel.*not finite"):
        fs.quantize(tied.replace(params=broken), "int8")


@pytest.mark.parametrize(
    ("written", "said"), [("int3", "weights must be one of"), ("float", "left over"), ("int4", "missing|wrong shape")]
)
def test_a_file_of_an_unknown_or_another_scheme_is_refused(tied, tmp_path, written, said):
    fs.quantize(tied, "int8").save_pretrained(tmp_path, format="flax_switch")
    path = tmp_path / "flax_switch.json"
    values = json.loads(path.read_text())
    values["config"]["weights"] = written
    path.write_text(json.dumps(values))
    with pytest.raises(fs.CheckpointError, match=said):
        fs.load_pretrained(tmp_path)


def test_floats_that_call_themselves_integers_are_refused(tied, tmp_path, monkeypatch):
    small = fs.quantize(tied, "int8")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small.params)
    with pytest.raises(fs.CheckpointError, match="of the wrong shape"):
        fs.save_pretrained(tmp_path, small.config, params, format="flax_switch")
    monkeypatch.setattr("flax_switch.pretrained.saving.as_integers", lambda config, tensors: tensors)
    fs.save_pretrained(tmp_path, small.config, params, format="flax_switch")
    with pytest.raises(fs.CheckpointError, match="has dtype float32, where weights='int8' means int8"):
        fs.load_pretrained(tmp_path)


def test_commands_take_a_quantised_folder(tied, tmp_path, capsys):
    tied.save_pretrained(tmp_path / "float", format="flax_switch")
    small = str(tmp_path / "small")
    arguments = ["convert", str(tmp_path / "float"), small, "--to", "flax_switch", "--no-progress"]
    assert main([*arguments, "--weights", "int8", "--dtype", "bfloat16"]) == 0
    assert main(["inspect", small, "--json"]) == 0
    described = json.loads(capsys.readouterr().out.partition("\n")[2])
    float_count = sum(parameters_of(path, leaf.shape, leaf.dtype) for path, leaf in flatten(tied.params).items())
    assert described["total"] == float_count and described["config"]["weights"] == "int8"
    dtypes = {path: dtype for path, (dtype, _) in described["shapes"].items()}
    assert dtypes["token_embedder/embedding"] == "bfloat16" and {"int8", "float32"} <= set(dtypes.values())
    assert main([*arguments, "--overwrite", "--weights", "int5"]) == 2
    assert "weights must be one of" in capsys.readouterr().err
    assert main(["convert", small, str(tmp_path / "other"), "--to", "flax_switch", "--weights", "int4"]) == 2
    assert "int8 weights already" in capsys.readouterr().err


def test_the_table_of_a_quantised_model_counts_its_parameters(tied):
    for weights in INTEGERS:
        said = repr(fs.quantize(tied, weights))
        assert "encoder experts" in said and f"weights='{weights}'" in said


def test_axes_are_declared_for_values_and_scales_alike():
    axes = flatten(logical_axes(fs.SwitchTransformer(CONFIG.replace(weights="int4"))))
    assert axes["encoder/layers_1/mlp/expert/wo/kernel"] == ("expert", "embed", "mlp", None)
    assert axes["encoder/layers_1/mlp/expert/wo/kernel_scale"] == ("expert", "embed", "mlp", None)
    assert axes["decoder/logits_dense/kernel"] == ("vocab", "embed")
