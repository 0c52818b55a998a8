"""transformers 4's flax_model.msgpack: T5s written as its Flax models saved them, bit for bit, and files that are none."""

import json
from pathlib import Path

import flax.serialization
import hypothesis.strategies as st
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings

from flax_switch import CheckpointError
from flax_switch.convert import convert, open_checkpoint
from flax_switch.convert.canonical import unflatten
from flax_switch.convert.flax_msgpack import read_tree
from tests.convert import oracle

SIZES = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
KINDS = {
    "t5": {},
    "t5 v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


def as_flax(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict under transformers 4's Flax names: Dense kernels are [in, out], norms keep `weight`."""
    flat = {}
    for name, tensor in state.items():
        if "embed_tokens" in name:
            continue
        path = name.replace(".", "/")
        array = tensor.float().numpy()
        if "layer_norm" in name:
            flat[path] = array
        elif "shared" in name or "relative_attention_bias" in name:
            flat[path.removesuffix("weight") + "embedding"] = array
        else:
            flat[path.removesuffix("weight") + "kernel"] = np.ascontiguousarray(array.T)
    return flat


def saved(path: Path, kind: str, shards: int = 1, dtype: type = np.float32) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of a Flax T5, and the tensors that PyTorch's has."""
    config = transformers.T5Config(**SIZES, **KINDS[kind])
    state = transformers.T5ForConditionalGeneration(config).state_dict()
    if kind == "t5":
        state.pop("lm_head.weight")
    flat = {name: array.astype(dtype) for name, array in as_flax(state).items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    if shards == 1:
        (path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(unflatten(flat)))
        return path, state
    weight_map = {name: f"flax_model-{i % shards + 1:05d}-of-{shards:05d}.msgpack" for i, name in enumerate(sorted(flat))}
    for file in set(weight_map.values()):
        tree = unflatten({name: array for name, array in flat.items() if weight_map[name] == file})
        (path / file).write_bytes(flax.serialization.to_bytes(tree))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return path, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_flax_t5_becomes_the_tensors_of_pytorchs_bit_for_bit(tmp_path, kind, shards):
    source, state = saved(tmp_path / "flax", kind, shards)
    convert(source, tmp_path / "ours", to="flax_switch")
    for start in (source, tmp_path / "ours"):
        back = convert(start, tmp_path / f"from-{start.name}", to="huggingface")
        tensors = safetensors.torch.load_file(back / "model.safetensors")
        assert tensors.keys() == state.keys() - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(back).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


def test_bfloat16_stays_bfloat16(tmp_path):
    source, state = saved(tmp_path / "flax", "t5", dtype=ml_dtypes.bfloat16)
    tensor = open_checkpoint(source).tensors["token_embedder/embedding"]
    assert tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.numpy(), state["shared.weight"].numpy().astype(ml_dtypes.bfloat16))


def test_an_array_in_chunks_is_one_array_and_blocks_of_it_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    arrays = {"a": np.arange(60, dtype=np.float32).reshape(5, 4, 3), "b": np.arange(2, dtype=np.float16)}
    (tmp_path / "file").write_bytes(flax.serialization.to_bytes({"x": dict(arrays)}))
    assert b"chunked" in (tmp_path / "file").read_bytes()
    tensors = read_tree(tmp_path / "file")
    assert tensors.keys() == {"x/a", "x/b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[f"x/{name}"].numpy(), array)
    block = tensors["x/a"].read((slice(1, 4), slice(2, 3), slice(0, 2)))
    np.testing.assert_array_equal(block, arrays["a"][1:4, 2:3, 0:2])


@pytest.mark.parametrize("length", [3, 200, 300, 70_000])  # one byte and less, one, two and four of them
def test_an_array_in_chunks_may_be_of_any_length(length, tmp_path, monkeypatch):
    array = np.arange(5 * length, dtype=np.float64).reshape(length, 5)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", array.nbytes // 2)
    (tmp_path / "file").write_bytes(flax.serialization.to_bytes({"x": array}))
    np.testing.assert_array_equal(read_tree(tmp_path / "file")["x"].numpy(), array)


def packed(value: object, **options: bool) -> bytes:
    data = msgpack.packb(value, **options)
    assert data is not None
    return data


def array_of(shape, dtype="float32", contents=b""):
    return msgpack.ExtType(1, packed((shape, dtype, contents), use_bin_type=True))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "ends too early"),
        (b"\xdf\xff\xff\xff\xff", "ends too early"),
        (b"\x81" * 100, "a name was expected"),
        (b"\x81\xa1a" * 100, "levels deep"),
        (packed([1]), "a map of names"),
        (packed({"a": 1}), "is a number"),
        (packed({"a": "text"}), "a map of names"),
        (packed({"a/b": array_of([0])}), "no name"),
        (packed({"a": msgpack.ExtType(3, b"x")}), "no array"),
        (packed({"a": array_of([10**9, 10**9])}), "does not fit"),
        (packed({"a": array_of([2], contents=bytes(4))}), "does not fit"),
        (packed({"a": array_of([0], "object")}), "dtype 'object'"),
        (packed({"a": array_of([0])}) + b"x", "follow the last"),
        (b"\x82" + 2 * packed({"a": array_of([0])})[1:], "comes twice"),
        (packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {}}}), "chunks of 'a'"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path, contents, words):
    (tmp_path / "flax_model.msgpack").write_bytes(contents)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match=rf"flax_model\.msgpack.*{words}"):
        open_checkpoint(tmp_path)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_with_any_bytes_changed_reads_or_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.msgpack"
    contents = bytearray(flax.serialization.to_bytes({"a": {"b": np.ones((3, 4), "f4")}, "c": np.arange(300, dtype="f4")}))
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, min(60, len(contents)) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))] if data.draw(st.booleans()) else contents)
    try:
        assert sum(tensor.numpy().nbytes for tensor in read_tree(path).values()) <= len(contents)
    except CheckpointError as error:
        assert "mutated.msgpack" in str(error)


def test_safetensors_come_first(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "both")
    (folder / "flax_model.msgpack").write_bytes(b"not looked at")
    open_checkpoint(folder)
