"""What lies in a model's folder is a regular file of its own or is refused before it is opened; sizes are checked first."""

import json
import os
import shutil
import socket
import sys
import time
import tracemalloc

import numpy as np
import pytest

from flax_switch import CheckpointError, SwitchConfig
from flax_switch.convert import convert, open_checkpoint, training_run
from flax_switch.convert.checkpoint import COMPANIONS
from flax_switch.convert.tensors import from_array
from tests.convert import oracle, t5x_files
from tests.convert.test_publication import SMALL, digest, model, params

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are Unix's")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def bound_socket(path):
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    server.bind(path.name)
    os.chdir(here)
    server.close()


@pytest.mark.parametrize("make", [pipe, device, bound_socket])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "spiece.model", "tokenizer.json"],
)
def test_a_device_a_pipe_and_a_socket_are_refused_by_name_before_they_are_opened(tmp_path, make, name):
    source = model(tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    make(source / name)
    words = f"{name} is a {make.__name__.removeprefix('bound_')}"
    for opened in (open_checkpoint, lambda path: convert(path, tmp_path / "out", to="huggingface")):
        with pytest.raises(CheckpointError, match=words):
            opened(source)
    assert not (tmp_path / "out").exists()


def test_a_pipe_among_the_chunks_of_a_t5x_checkpoint_is_refused(tmp_path):
    flat = {path: np.asarray(leaf) for path, leaf in digestible().items()}
    t5x_files.write(tmp_path / "t5x", flat)
    chunk = next(path for path in sorted((tmp_path / "t5x").rglob("*")) if path.name[0].isdigit() and path.is_file())
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(CheckpointError, match="is a pipe"):
        open_checkpoint(tmp_path / "t5x")


def digestible():
    from flax_switch.convert.canonical import flatten

    return flatten(params(SMALL))


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_link_out_of_the_folder_is_never_copied_into_an_export(tmp_path, name):
    source = model(tmp_path / "source")
    (tmp_path / "secret").write_text("a secret")
    (source / name).symlink_to(tmp_path / "secret")
    for to in ("huggingface", "flax_switch"):
        with pytest.raises(CheckpointError, match=f"{name} is a link out of the folder"):
            convert(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_and_to_the_hub_caches_blobs_are_followed(tmp_path):
    cached = tmp_path / "models--owner--name"
    (cached / "blobs").mkdir(parents=True)
    snapshot = model(cached / "snapshots" / "abc")
    (snapshot / "generation_config.json").write_text('{"num_beams": 2}')
    for path in list(snapshot.iterdir()):
        shutil.move(path, cached / "blobs" / f"blob-{path.name}")
        path.symlink_to(f"../../blobs/blob-{path.name}")
    (snapshot / "added_tokens.json").symlink_to("generation_config.json")
    out = convert(snapshot, tmp_path / "out", to="huggingface")
    for name in ("generation_config.json", "added_tokens.json"):
        assert (out / name).read_text() == '{"num_beams": 2}' and not (out / name).is_symlink()
    (cached / "blobs").rename(tmp_path / "elsewhere")
    (cached / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        convert(snapshot, tmp_path / "again", to="huggingface")


def test_links_out_of_the_folder_are_followed_for_weights_and_config(tmp_path):
    source = model(tmp_path / "source")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (linked / name).symlink_to(source / name)
    assert digest(convert(linked, tmp_path / "out", to="flax_switch")) == digest(source)


@pytest.mark.parametrize("form", ["huggingface", "flax_switch"])
@pytest.mark.parametrize("size", [10**5, 10**9, 10**30])
@pytest.mark.parametrize(
    "name", ["d_model", "d_ff", "d_kv", "num_heads", "vocab_size", "num_experts", "num_layers", "num_decoder_layers"]
)
def test_a_size_that_the_tensors_do_not_have_ends_at_once_in_little_memory(tmp_path, form, size, name):
    source = model(tmp_path / "source", form)
    path = source / ("config.json" if form == "huggingface" else "flax_switch.json")
    values = json.loads(path.read_text())
    if form == "huggingface":
        values[name] = size
    else:
        values["config"][name.replace("num_layers", "num_encoder_layers")] = size
    path.write_text(json.dumps(values))
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(CheckpointError, match=r"source.*(too few|the tensors do not fit|and at most 2147483647)"):
            open_checkpoint(source)
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20 and time.monotonic() - began < 5
    finally:
        tracemalloc.stop()


def test_many_experts_in_a_small_file_end_at_once(tmp_path):
    source = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    names = ("num_experts", "num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
    (source / "config.json").write_text(json.dumps(values | dict.fromkeys(names, 1000)))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(source)
    assert time.monotonic() - began < 5


def test_a_runs_config_is_compared_with_its_tensors_before_anything_is_built(tmp_path, monkeypatch):
    step = tmp_path / "run" / "checkpoints" / "7"
    (step / "params").mkdir(parents=True)
    model = SwitchConfig().to_dict() | {"num_encoder_layers": 10**9}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": model, "train": {}}))
    tensors = {"encoder/layers_0/mlp/wi/kernel": from_array(np.zeros((2, 2), np.float32))}
    monkeypatch.setattr(training_run, "read_params", lambda folder: tensors)
    with pytest.raises(CheckpointError, match="num_encoder_layers=1000000000, and 1 tensors"):
        training_run.read_run(step)


@pytest.mark.parametrize(
    ("name", "value"), [("huggingface", 5), ("huggingface", []), ("architecture", []), ("config", None), ("format_version", True)]
)
def test_a_folder_of_ours_whose_fields_are_of_another_kind_is_refused_by_their_names(tmp_path, name, value):
    source = model(tmp_path / "source", "flax_switch")
    values = json.loads((source / "flax_switch.json").read_text())
    (source / "flax_switch.json").write_text(json.dumps(values | {name: value}))
    with pytest.raises(CheckpointError, match=f"flax_switch.json: (field '{name}'|{name}) must be"):
        convert(source, tmp_path / "out", to="huggingface")
