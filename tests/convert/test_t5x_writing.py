"""T5X checkpoints that are written: read as T5X reads them, the same bits there and back."""

from pathlib import Path

import flax.serialization
import numpy as np
import pytest
import tensorstore as ts
import transformers

from flax_switch import CheckpointError, ConfigError, load_pretrained, save_pretrained
from flax_switch.convert import convert, open_checkpoint, stack_layers, t5x_writing
from flax_switch.convert.canonical import canonical_shapes, flatten
from tests.convert import oracle, t5x_files
from tests.convert.test_family import folder_of, model_of
from tests.convert.test_t5x import CONFIGS, assert_same, random_params


def read_as_t5x(checkpoint):
    """What T5X's `checkpoints.py` does to restore a model for inference, retold: the file, then each array that it names."""
    contents = flax.serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    assert contents["version"] == 3
    assert contents["optimizer"].keys() == {"target", "state"} and contents["optimizer"]["state"].keys() == {"step"}
    found = {}
    leaves = flax.traverse_util.flatten_dict(contents["optimizer"]["target"], is_leaf=lambda _, x: "driver" in x, sep="/")
    for path, value in leaves.items():
        spec = ts.Spec(value).to_json()
        assert spec["kvstore"]["path"] == f"target.{path.replace('/', '.')}/", "relative, so that the folder can be moved"
        del spec["metadata"]["chunks"], spec["metadata"]["compressor"]
        spec["kvstore"]["path"] = f"{checkpoint}/{spec['kvstore']['path']}"
        store = ts.open(spec, open=True).result()
        assert tuple(spec["metadata"]["shape"]) == store.shape
        found[path] = store.read().result()
    return found, int(contents["optimizer"]["state"]["step"])


def same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert (found[path].dtype, found[path].shape, found[path].tobytes()) == (array.dtype, array.shape, array.tobytes()), path


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_what_t5x_reads_and_what_came_from_it(tmp_path, name):
    params = random_params(CONFIGS[name])
    source = t5x_files.write(tmp_path / "t5x", params, step=1_000_000)
    back = convert(source, tmp_path / "back", to="t5x", changes={"mlp_activations": CONFIGS[name].mlp_activations})
    found, step = read_as_t5x(back / "checkpoint_1000000")
    assert step == 1_000_000
    same_arrays(found, params)
    assert_same(open_checkpoint(back).tensors, params)


def test_scanned_layers_are_stacked_as_t5x_stacks_them(tmp_path):
    config, params = CONFIGS["switch"], random_params(CONFIGS["switch"])
    source = t5x_files.write(tmp_path / "t5x", params)
    back = convert(source, tmp_path / "back", to="t5x", changes={"scan_layers": True})
    same_arrays(read_as_t5x(back / "checkpoint_10")[0], stack_layers(params, config))
    assert_same(open_checkpoint(back).tensors, params)


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_a_hugging_face_model_goes_to_t5x_and_back_to_the_same_bits_and_logits(tmp_path, name):
    model = model_of(name, 0, own_head=name != "T5")
    theirs = folder_of(model, tmp_path / "theirs")
    t5x = convert(theirs, tmp_path / "t5x", to="t5x")
    untold = {"mlp_activations": ("gelu_new", "linear"), "relative_attention_max_distance": 20}  # by shapes
    back = convert(t5x, tmp_path / "back", to="huggingface", changes=untold)
    first, second = open_checkpoint(theirs), open_checkpoint(back)
    assert_same(second.tensors, {path: tensor.numpy() for path, tensor in first.tensors.items()})
    batch = oracle.draw_batch(model.config, 0)
    expected = load_pretrained(theirs)(**batch.numpy()).logits
    np.testing.assert_array_equal(load_pretrained(back)(**batch.numpy()).logits, expected)


def test_a_switch_transformer_of_transformers_goes_to_t5x_and_back(tmp_path):
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=3,
    )  # fmt: skip
    oracle.save(oracle.huggingface_model(config, 0, transformers.SwitchTransformersForConditionalGeneration), tmp_path / "theirs")
    t5x = convert(tmp_path / "theirs", tmp_path / "t5x", to="t5x", dtype="bfloat16")
    found, step = read_as_t5x(t5x / "checkpoint_0")
    assert step == 0 and {str(array.dtype) for array in found.values()} == {"bfloat16", "float32"}, "routers keep theirs"
    first = convert(tmp_path / "theirs", tmp_path / "ours", to="flax_switch", dtype="bfloat16")
    assert_same(open_checkpoint(t5x).tensors, {path: t.numpy() for path, t in open_checkpoint(first).tensors.items()})


def test_stacks_are_written_in_blocks_that_are_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("flax_switch.convert.tensors.BLOCK_BYTES", 600)
    monkeypatch.setattr(t5x_writing, "BLOCK_BYTES", 600)
    params = random_params(CONFIGS["switch"])
    back = convert(t5x_files.write(tmp_path / "t5x", params), tmp_path / "back", to="t5x") / "checkpoint_10"
    same_arrays(read_as_t5x(back)[0], params)
    experts = back / "target.encoder.layers_1.mlp.expert.wi.kernel"
    assert sorted(path.name for path in experts.iterdir()) == [".zarray", "0.0.0", "1.0.0", "2.0.0"]


def test_an_interrupted_one_goes_on_where_it_was(tmp_path, monkeypatch):
    params, write, written = random_params(CONFIGS["switch"]), t5x_writing.write_zarr, []

    def stopped(path, shard, on_bytes):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, shard, on_bytes)

    source = t5x_files.write(tmp_path / "t5x", params)
    monkeypatch.setattr(t5x_writing, "write_zarr", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "back", to="t5x")
    assert not (tmp_path / "back").exists()
    before, written = list(written), written[:0]
    monkeypatch.setattr(t5x_writing, "write_zarr", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    back = convert(source, tmp_path / "back", to="t5x")
    same_arrays(read_as_t5x(back / "checkpoint_10")[0], params)
    assert len(written) == len(params) - 5 and not set(before) & set(written)
    assert not list(Path(tmp_path).glob("back.partial*"))


def test_parts_of_models_are_refused_and_no_checkpoint_is_overwritten(tmp_path):
    encoder = folder_of(model_of("MT5", 1, "EncoderModel"), tmp_path / "encoder")
    headed = load_pretrained(folder_of(model_of("MT5", 1), tmp_path / "whole"), head="classification", labels=("a", "b"))
    with pytest.raises(ConfigError, match="whole models.*'encoder'"):
        convert(encoder, tmp_path / "none", to="t5x")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="whole models.*'classification'"):
        save_pretrained(tmp_path / "none", headed.config, headed.params, format="t5x")
    t5x = convert(t5x_files.write(tmp_path / "t5x", random_params(CONFIGS["switch"])), tmp_path / "back", to="t5x")
    with pytest.raises(CheckpointError, match="T5X checkpoint"):
        convert(tmp_path / "t5x", t5x, to="t5x", overwrite=True)


def test_a_decoder_alone_is_written_with_its_own_names(tmp_path):
    config = CONFIGS["t5 1.1"].replace(architecture="decoder_only", num_encoder_layers=0)
    params = random_params(config)
    back = convert(t5x_files.write(tmp_path / "t5x", params), tmp_path / "back", to="t5x")
    same_arrays(read_as_t5x(back / "checkpoint_10")[0], params)
    assert set(flatten(params)) == set(canonical_shapes(config))
