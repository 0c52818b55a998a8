"""The file format and the folder: agreement with the library, safety, interruption, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import transformers
from hypothesis import given, settings

from flax_switch import CheckpointError, SwitchConfig
from flax_switch.convert import checkpoint, convert, folder, open_checkpoint
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.safetensors_file import read_safetensors, write_safetensors
from flax_switch.convert.tensors import LazyTensor, from_array
from tests.convert import oracle, t5x_files

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(3).astype(ml_dtypes.bfloat16),
    "c": np.arange(5, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.array(3.5, np.float32),
    "stack": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}


def test_what_we_write_the_library_reads_and_the_other_way_round(tmp_path):
    write_safetensors(tmp_path / "ours", {name: from_array(array) for name, array in TENSORS.items()})
    safetensors.numpy.save_file(TENSORS, tmp_path / "theirs")
    read = {name: tensor.numpy() for name, tensor in read_safetensors(tmp_path / "theirs").items()}
    for found in (safetensors.numpy.load_file(tmp_path / "ours"), read):
        assert found.keys() == TENSORS.keys()
        for name, array in TENSORS.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)


def test_a_block_is_read_without_the_rest(tmp_path):
    write_safetensors(tmp_path / "file", {"stack": from_array(TENSORS["stack"])})
    block = read_safetensors(tmp_path / "file")["stack"].read((slice(1, 2), slice(0, 2), slice(1, 3)))
    np.testing.assert_array_equal(block, TENSORS["stack"][1:2, 0:2, 1:3])


def file_with_header(path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{not json", b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        ([1, 2], b"", "no JSON object"),
        (b'{"a": 1, "a": 2}', b"", "twice: a"),
        ({"a": 5}, b"", "entry for 'a'"),
        ({"a": {**F32, "dtype": "F7"}}, bytes(8), "dtype 'F7'"),
        ({"a": {**F32, "shape": [3]}}, bytes(8), "corrupt: 'a'"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "corrupt: 'a'"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "corrupt: 'a'"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "corrupt: 'a'"),
        ({"a": F32}, bytes(4), "should have"),
        ({"a": F32}, bytes(12), "should have"),
        ({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12), "start at 4"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "'b' start at 4"),
    ],
)
def test_a_corrupt_header_is_an_error_that_says_where(tmp_path, header, data, words):
    with pytest.raises(CheckpointError, match=words):
        read_safetensors(file_with_header(tmp_path / "bad.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 200_000_000, 100])
def test_a_header_larger_than_the_file_or_the_limit_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_safetensors(file_with_header(tmp_path / "bad.safetensors", {}, length=length))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_file_with_any_bytes_changed_reads_or_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    write_safetensors(path, {name: from_array(array) for name, array in TENSORS.items()})
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))] if data.draw(st.booleans()) else contents)
    try:
        for tensor in read_safetensors(path).values():
            assert tensor.numpy().nbytes == tensor.nbytes <= len(contents)
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error)


@pytest.mark.parametrize("size", [0, 5, 40, 1000])
def test_a_truncated_file_is_refused_and_nothing_is_written(tmp_path, size):
    source = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    os.truncate(source / "model.safetensors", size)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        convert(source, tmp_path / "ours", to="flax_switch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 rubbish", b"\x80\x02garbage"])
def test_a_corrupt_torch_file_is_refused(tmp_path, contents):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    (tmp_path / "pytorch_model.bin").write_bytes(contents)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_checkpoint(tmp_path)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    torch.save({"shared.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no readable state dict"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def sharded(tmp_path) -> Path:
    model = oracle.huggingface_model(oracle.huggingface_config())
    return oracle.save(model, tmp_path / "theirs", max_shard_size="20KB")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: m | {"shared.weight": "../model.safetensors"}, "its own folder"),
        (lambda m: m | {"shared.weight": "/etc/passwd"}, "its own folder"),
        (lambda m: m | {"shared.weight": ".."}, "its own folder"),
        (lambda m: m | {"shared.weight": 3}, "is no index"),
        (lambda m: m | {"shared.weight": "model-00009-of-00009.safetensors"}, "not in the folder"),
        (lambda m: {k: v for k, v in m.items() if k != "shared.weight"}, "disagree.*shared.weight"),
        (lambda m: m | {"extra.weight": m["shared.weight"]}, "disagree.*extra.weight"),
    ],
    ids=["climbs", "absolute", "parent", "no string", "absent shard", "unlisted", "listed too much"],
)
def test_a_wrong_index_is_refused_and_nothing_is_written(tmp_path, damage, words):
    source = sharded(tmp_path)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = damage(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "ours", to="flax_switch")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def t5(tied: bool, path: Path, held: set[str], listed: set[str]) -> Path:
    """A T5 whose shard and index hold tensors of these names besides all that are no embeddings."""
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config = transformers.T5Config.from_dict(dict(sizes, tie_word_embeddings=tied, decoder_start_token_id=0))
    state = transformers.T5ForConditionalGeneration(config).state_dict()
    others = {name for name in state if "embed" not in name and name != "lm_head.weight"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["T5ForConditionalGeneration"]}))
    file = "model-00001-of-00001.safetensors"
    safetensors.torch.save_file({n: state[n].clone() for n in others | held}, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(others | listed, file)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


HEAD, COPIES = {"lm_head.weight"}, {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


@pytest.mark.parametrize(("held", "listed"), [(set(), HEAD | COPIES), (HEAD | COPIES, set()), (HEAD, COPIES)])
def test_index_and_shards_may_disagree_over_copies_of_the_embedding(tmp_path, held, listed):
    folder = t5(True, tmp_path / "t5", held, listed)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).state_dict()
    tensors = open_checkpoint(folder).tensors
    np.testing.assert_array_equal(tensors["token_embedder/embedding"].numpy(), theirs["shared.weight"].numpy())
    assert "decoder/logits_dense/kernel" not in tensors


def test_index_and_shards_must_agree_over_a_head_of_its_own(tmp_path):
    open_checkpoint(t5(False, tmp_path / "good", HEAD, HEAD | COPIES))
    with pytest.raises(CheckpointError, match=r"disagree.*: lm_head\.weight"):
        open_checkpoint(t5(False, tmp_path / "bad", set(), HEAD))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "\x00"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    source = sharded(tmp_path)
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint(source)


@pytest.mark.parametrize("text", ["", "3", "{", '{"model_type": "bert"}'])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        open_checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match="config.json.*checkpoint_<step>.*flax_switch.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)


def test_parts_that_do_not_follow_each_other_are_refused():
    part = from_array(np.zeros((2, 3, 4)))
    with pytest.raises(CheckpointError, match="do not follow"):
        folder.join_parts({"w[0:2]": part, "w[3:5]": part})
    assert folder.join_parts({"w[2:4]": part, "w[0:2]": part})["w"].shape == (4, 3, 4)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("300 MiB", 300 * 2**20), (12, 12), ("1.5kb", 1500)])
def test_sizes_are_numbers_with_units(text, size):
    assert folder.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 parsecs", "-3GB", "0"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="5GB"):
        folder.parse_size(text)


def test_an_interrupted_conversion_leaves_no_model_and_running_again_finishes_it(tmp_path, monkeypatch):
    source = sharded(tmp_path)
    written = []
    original = write_safetensors

    def dies_at_the_third(path, tensors, on_bytes):
        if len(written) == 2:
            path.write_bytes(b"half a sha")
            raise KeyboardInterrupt
        written.append(path.name)
        original(path, tensors, on_bytes)

    monkeypatch.setattr(checkpoint, "write_safetensors", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "ours", to="huggingface", max_shard_size="12KB")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(CheckpointError, match="interrupted"):
        open_checkpoint(tmp_path / "ours.partial")

    def counts(path, tensors, on_bytes):
        written.append(path.name)
        original(path, tensors, on_bytes)

    monkeypatch.setattr(checkpoint, "write_safetensors", counts)
    first = list(written)
    progress = []
    convert(source, tmp_path / "ours", to="huggingface", max_shard_size="12KB", on_bytes=progress.append, on_open=progress.append)
    assert not set(first) & set(written[2:])  # finished shards were kept
    assert progress[0] == sum(progress[1:])
    assert not (tmp_path / "ours.partial").exists()
    whole = convert(source, tmp_path / "whole", to="huggingface", max_shard_size="12KB")
    for path in whole.iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_shards_of_another_source_are_not_taken_over(tmp_path, monkeypatch):
    source = sharded(tmp_path)
    monkeypatch.setattr(folder.Path, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "ours", to="huggingface")
    monkeypatch.undo()
    (tmp_path / "ours.partial" / "model.safetensors").write_bytes(b"of another source")
    other = oracle.save(oracle.huggingface_model(oracle.huggingface_config(), seed=9), tmp_path / "other")
    convert(other, tmp_path / "ours", to="huggingface")
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size > 1000


MEMORY_SCRIPT = """
import re, sys
from flax_switch.convert import convert

def peak():  # not getrusage: its maximum is inherited from the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

convert(sys.argv[1], sys.argv[2], to="flax_switch", max_shard_size="1MB")  # imports and warms up
before = peak()
convert(sys.argv[3], sys.argv[4], to=sys.argv[5], max_shard_size=sys.argv[6])
print(peak() - before)
"""


def random_model(config: SwitchConfig, path: Path) -> None:
    """A folder of ours with the same 1 MB of noise over and over: made as cheaply as it is read."""
    noise = np.random.default_rng(0).standard_normal(2**18).astype(np.float32)

    def tensor(shape):
        def read(index):
            sizes = [s.stop - s.start for s in index]
            return np.resize(noise, sizes)

        return LazyTensor(shape, np.dtype(np.float32), read)

    from flax_switch.convert import native

    tensors = {name: tensor(shape) for name, shape in canonical_shapes(config).items()}
    files = {native.CONFIG_FILE: native.config_file(config, "full", None)}
    shards, index = folder.named(folder.split_into_shards(tensors, 10**9, split_stacks=True), native.STEM)
    folder.write_folder(path, shards, {**files, **index})


def memory_of(tmp_path, source: str, to: str, target: str, shard: int) -> int:
    """How much a conversion's peak memory exceeds that of a small one before it, in a process of its own."""
    paths = [str(tmp_path / name) for name in ("warm", f"warm-{target}", source, target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEMORY_SCRIPT, *paths, to, str(shard)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return int(result.stdout.split()[-1])


BIG = SwitchConfig(
    vocab_size=8192, d_model=256, num_heads=4, d_kv=64, d_ff=1024, num_encoder_layers=4, num_decoder_layers=4,
    num_sparse_encoder_layers=4, num_sparse_decoder_layers=4, num_experts=16, capacity_mode="fixed",
)  # fmt: skip


def test_peak_memory_is_bounded_by_the_shard_and_the_largest_tensor_not_by_the_checkpoint(tmp_path):
    random_model(BIG, tmp_path / "source")
    oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "warm")
    sizes = [tensor.nbytes for tensor in open_checkpoint(tmp_path / "source").tensors.values()]
    shard = 32 * 10**6
    assert sum(sizes) > 8 * shard
    for to, source, target in (("huggingface", "source", "theirs"), ("flax_switch", "theirs", "back")):
        assert 10**6 < memory_of(tmp_path, source, to, target, shard) < 1.2 * shard + max(sizes), to


@pytest.mark.slow
def test_reading_t5x_is_bounded_in_the_same_way(tmp_path):
    rng = np.random.default_rng(0)
    params = {path: np.resize(rng.integers(0, 9, 2**14), shape).astype(np.float32) for path, shape in canonical_shapes(BIG).items()}
    sizes = [array.nbytes for array in params.values()]
    t5x_files.write(tmp_path / "source", params)
    small = SwitchConfig(vocab_size=8, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=12, num_decoder_layers=12)
    t5x_files.write(tmp_path / "warm", {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(small).items()})
    shard = 32 * 10**6
    for to in ("huggingface", "flax_switch"):
        assert 10**6 < memory_of(tmp_path, "source", to, f"to-{to}", shard) < 1.2 * shard + max(sizes), to


def test_importing_the_package_starts_neither_torch_nor_transformers_nor_jax():
    code = (
        "import sys, flax_switch.convert; print([m for m in ('torch', 'transformers', 'jax', 'tensorstore') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
