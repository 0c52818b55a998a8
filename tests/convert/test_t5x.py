"""T5X checkpoints load to the last bit, whatever form they are in, and go on to Hugging Face."""

import json
import shutil

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from flax_switch import CheckpointError, SwitchConfig, load_pretrained
from flax_switch.convert import convert, open_checkpoint, stack_layers
from flax_switch.convert.canonical import canonical_shapes
from tests.convert import oracle, t5x_files

SWITCH = SwitchConfig(
    vocab_size=30, d_model=8, num_heads=2, d_kv=3, d_ff=10, num_encoder_layers=4, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=3,
)  # fmt: skip
CONFIGS = {
    "switch": SWITCH,
    "untied": SWITCH.replace(tie_word_embeddings=False),
    "gated": SWITCH.replace(mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False),
    "all sparse": SWITCH.replace(num_sparse_encoder_layers=4, num_sparse_decoder_layers=2),
    "bottom": SWITCH.replace(encoder_sparse_layers=(0,), num_sparse_encoder_layers=1),
    "st-moe": SWITCH.replace(extra_mlp=True, mlp_activations=("gelu_new", "linear"), expert_d_ff=6),
    "bias": SWITCH.replace(router_bias=True),
    "t5 1.0": SWITCH.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
    "t5 1.1": SWITCH.replace(
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False
    ),
}


def random_params(config: SwitchConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(0, 0.3, shape).astype(dtype) for path, shape in canonical_shapes(config).items()}


def assert_same(tensors, params) -> None:
    assert tensors.keys() == params.keys()
    for path, array in params.items():
        read = tensors[path].numpy()
        assert read.dtype == array.dtype, path
        assert read.tobytes() == array.tobytes(), path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_told_by_the_shapes_and_every_bit_is_kept(tmp_path, name):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    opened = open_checkpoint(t5x_files.write(tmp_path, params))
    assert opened.format == "t5x"
    found = opened.config if config.is_sparse else opened.config.replace(num_experts=config.num_experts)
    assert found == config
    assert_same(opened.tensors, params)


def test_sparse_layers_are_told_in_their_order_however_many_layers_there_are(tmp_path):
    """1 and 8 lie the other way round in a set."""
    config = SWITCH.replace(num_encoder_layers=9, encoder_sparse_layers=(1, 8), num_sparse_encoder_layers=2)
    assert open_checkpoint(t5x_files.write(tmp_path, random_params(config))).config == config


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("spec_form", "driver"), [("new", "file"), ("old", "gcs"), ("new", "gfile"), ("old", "file")])
def test_both_spec_forms_all_drivers_dtypes_and_scanned_layers_load_to_the_last_bit(tmp_path, spec_form, driver, dtype, scanned):
    config = SWITCH.replace(relative_attention_per_layer=scanned)
    params = random_params(config, dtype)
    written = stack_layers(params, config) if scanned else params
    folder = t5x_files.write(tmp_path, written, spec_form=spec_form, driver=driver)
    opened = open_checkpoint(folder)
    assert opened.config == config.replace(param_dtype=np.dtype(dtype).name)
    assert_same(opened.tensors, params)


def test_everything_inline_and_everything_in_zarr_are_the_same(tmp_path):
    params = random_params(SWITCH)
    for inline in (0, 10**9):
        assert_same(open_checkpoint(t5x_files.write(tmp_path / str(inline), params, inline=inline)).tensors, params)


def test_a_scanned_dense_stack_without_subblocks_and_kernels_with_a_heads_axis_load(tmp_path):
    config = CONFIGS["t5 1.0"].replace(relative_attention_per_layer=True)
    params = random_params(config)
    written = {}
    for path, array in stack_layers(params, config).items():
        path = path.replace("/subblock_0/", "/")
        if "attention/out/kernel" in path:
            array = array.reshape(2, 3, *array.shape[1:]).transpose(0, 2, 1, 3)  # [H, L, K, D]
        elif path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            array = array.reshape(*array.shape[:2], 2, 3)  # [D, L, H, K]
        written[path] = array
    assert_same(open_checkpoint(t5x_files.write(tmp_path, written)).tensors, params)


def test_the_latest_step_of_a_folder_is_taken(tmp_path):
    for step, scale in ((5, 1.0), (100, 2.0), (20, 3.0)):
        t5x_files.write(tmp_path, {p: a * np.float32(scale) for p, a in random_params(SWITCH).items()}, step=step)
    assert_same(open_checkpoint(tmp_path).tensors, {p: a * np.float32(2) for p, a in random_params(SWITCH).items()})


@pytest.mark.parametrize("name", ["switch", "untied", "t5 1.0", "t5 1.1"])
def test_t5x_to_ours_to_hugging_face_keeps_every_bit_and_the_head(tmp_path, name):
    params = random_params(CONFIGS[name])
    source = t5x_files.write(tmp_path / "t5x", params)
    ours = convert(source, tmp_path / "ours", to="flax_switch", max_shard_size="1KB")
    assert_same(open_checkpoint(ours).tensors, params)
    theirs = convert(ours, tmp_path / "theirs", to="huggingface")
    dense = name.startswith("t5")
    kind = transformers.T5ForConditionalGeneration if dense else transformers.SwitchTransformersForConditionalGeneration
    model, report = kind.from_pretrained(theirs, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_array_equal(model.shared.weight.detach(), params["token_embedder/embedding"])
    for stack in (model.encoder, model.decoder):
        np.testing.assert_array_equal(stack.embed_tokens.weight.detach(), params["token_embedder/embedding"])
    if not CONFIGS[name].tie_word_embeddings:
        np.testing.assert_array_equal(model.lm_head.weight.detach().T, params["decoder/logits_dense/kernel"])
    if not dense:
        experts = model.encoder.block[3].layer[1].mlp.experts
        np.testing.assert_array_equal(experts.expert_2.wi.weight.detach().T, params["encoder/layers_3/mlp/expert/wi/kernel"][2])


def test_a_converted_dense_t5_gives_the_same_logits_in_transformers(tmp_path):
    params = random_params(CONFIGS["t5 1.1"])
    source = t5x_files.write(tmp_path / "t5x", params)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(convert(source, tmp_path / "theirs", to="huggingface")).eval()
    ours = load_pretrained(source)
    batch = oracle.draw_batch(theirs.config, 0)
    inputs = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        expected = theirs(**batch.torch(*inputs)).logits.numpy()
    np.testing.assert_allclose(ours(**batch.numpy(*inputs)).logits, expected, atol=2e-4 * np.abs(expected).max())


def test_settings_that_shapes_cannot_tell_can_be_given(tmp_path):
    source = t5x_files.write(tmp_path, random_params(CONFIGS["gated"]))
    changes = {"num_selected_experts": 2, "mlp_activations": ("silu", "linear")}
    opened = open_checkpoint(source, changes=changes)
    assert opened.config.num_selected_experts == 2 and opened.config.mlp_activations == ("silu", "linear")


def damage_spec(source, change) -> None:
    file = source / "checkpoint"
    contents = flax.serialization.msgpack_restore(file.read_bytes())
    change(contents["optimizer"]["target"]["token_embedder"]["embedding"])
    file.write_bytes(flax.serialization.msgpack_serialize(contents))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec["kvstore"].update(path="../../secret"), "beside the checkpoint"),
        (lambda spec: spec["kvstore"].update(path=""), "beside the checkpoint"),
        (lambda spec: spec["kvstore"].pop("path"), "beside the checkpoint"),
        (lambda spec: spec["kvstore"].update(path="target.elsewhere"), "no zarr array"),
        (lambda spec: spec.update(driver="n5"), "n5"),
        (lambda spec: spec["kvstore"].update(driver="http"), "http"),
    ],
    ids=["climbs", "empty", "none", "absent", "driver", "kvstore"],
)
def test_a_spec_that_leads_elsewhere_is_refused(tmp_path, change, words):
    source = t5x_files.write(tmp_path, random_params(SWITCH))
    damage_spec(source, change)
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "ours", to="flax_switch")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("cut", [0, 10, -20])
def test_a_truncated_msgpack_file_is_refused(tmp_path, cut):
    file = t5x_files.write(tmp_path, random_params(SWITCH)) / "checkpoint"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_msgpack_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"a": np.zeros(2)}))
    with pytest.raises(CheckpointError, match="optimizer/target"):
        open_checkpoint(tmp_path)
    source = t5x_files.write(tmp_path / "vision", {"vit/kernel": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match="vit/kernel"):
        open_checkpoint(source)


def test_a_missing_layer_and_a_surplus_tensor_are_named(tmp_path):
    params = random_params(SWITCH)
    del params["decoder/layers_1/mlp/expert/wo/kernel"]
    params["encoder/visual/kernel"] = np.zeros((2, 2), np.float32)
    source = t5x_files.write(tmp_path, params)
    with pytest.raises(CheckpointError, match=r"missing: decoder/layers_1/mlp/expert/wo/kernel.*left over: encoder/visual/kernel"):
        open_checkpoint(source)
    forgiven = open_checkpoint(source, allow_missing=["decoder/layers_1/mlp/expert/wo/*", "encoder/visual/*"])
    assert "decoder/layers_1/mlp/expert/wo/kernel" not in forgiven.tensors


def test_a_lost_zarr_folder_is_named_before_anything_is_written(tmp_path):
    source = t5x_files.write(tmp_path / "t5x", random_params(SWITCH))
    shutil.rmtree(source / "target.token_embedder.embedding")
    with pytest.raises(CheckpointError, match="token_embedder/embedding"):
        convert(source, tmp_path / "ours", to="flax_switch")
    assert not (tmp_path / "ours").exists()


def test_our_folder_tells_the_config_again(tmp_path):
    ours = convert(t5x_files.write(tmp_path / "t5x", random_params(CONFIGS["st-moe"])), tmp_path / "ours", to="flax_switch")
    assert open_checkpoint(ours).config == CONFIGS["st-moe"]
    assert json.loads((ours / "flax_switch.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("name", ["untied", "t5 1.1"])
def test_a_new_head_is_put_on_what_the_shapes_tell(tmp_path, name):
    params = random_params(CONFIGS[name])
    changes = dict(head="token_classification", labels=["a", "b"], dropout_rate=0.0)
    opened = open_checkpoint(t5x_files.write(tmp_path, params), changes=changes)
    assert (opened.architecture, opened.config.labels, opened.config.dropout_rate) == ("token_classification", ("a", "b"), 0.0)
    assert_same(opened.tensors, {path: array for path, array in params.items() if not path.startswith("decoder/")})
