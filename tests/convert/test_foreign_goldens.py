"""Drift gates of what is read from Orbax and Hugging Face: samples of each supported version; unknown forms are errors."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_switch.config import ConfigError
from flax_switch.config.huggingface import from_huggingface
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.huggingface import find_architecture, rules_for, settle_embeddings
from flax_switch.convert.mapping import to_canonical
from flax_switch.convert.tensors import CheckpointError, from_array
from flax_switch.convert.training_run import parse_metadata, read_params

from .make_goldens import FOLDER, SIZES, SPARSE, TREE

ORBAX = sorted(FOLDER.glob("orbax-*.json"))
HUGGINGFACE = sorted(FOLDER.glob("*.transformers-*.json"))


def ids(files):
    return [file.stem for file in files]


@pytest.mark.parametrize("file", ORBAX, ids=ids(ORBAX))
def test_orbaxs_layout_is_read_for_every_supported_version(file):
    zarr3, entries = parse_metadata(file.read_text())
    paths = jax.tree_util.tree_leaves_with_path(TREE, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert zarr3 is False and sorted(entries) == sorted([key.key for key in path] for path, _ in paths)


def without(name):
    return lambda metadata: metadata.pop(name)


def changed(name, value):
    return lambda metadata: metadata.update({name: value})


def nameless(metadata):
    next(iter(metadata["tree_metadata"].values()))["key_metadata"] = ["decoder", "kernel"]


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        (without("use_zarr3"), '"use_ocdbt": true'),
        (without("tree_metadata"), '"use_zarr3": false'),
        (changed("use_ocdbt", False), '"use_ocdbt": false'),
        (changed("use_zarr3", "v4"), '"use_zarr3": "v4"'),
        (nameless, '"key_metadata": ["decoder", "kernel"]'),
    ],
    ids=["no use_zarr3", "no tree", "no ocdbt", "another zarr", "other keys"],
)
def test_another_layout_of_orbax_is_an_error_that_quotes_it(change, quoted, tmp_path):
    metadata = json.loads(ORBAX[-1].read_text())
    metadata["tree_metadata"].pop("('token_embedder', 'embedding')")  # the message quotes no more than some of it
    change(metadata)
    (tmp_path / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError) as raised:
        read_params(tmp_path)
    assert "and got {" in str(raised.value) and quoted in str(raised.value)


def read(values, shapes):
    """Tensors of these names and shapes under our names, as a folder's are read."""
    tensors = {name: from_array(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    config = from_huggingface(values)
    config, tensors = settle_embeddings(config, values, find_architecture(config, values, tensors), tensors)
    return to_canonical(tensors, rules_for(values["model_type"]), canonical_shapes(config))


@pytest.mark.parametrize("file", HUGGINGFACE, ids=ids(HUGGINGFACE))
def test_hugging_faces_names_and_keys_are_read_for_every_supported_version(file):
    golden = json.loads(file.read_text())
    config = from_huggingface(golden["config"])
    sparse = file.stem.startswith("switch")
    assert (config.vocab_size, config.d_model, config.d_kv, config.num_heads, config.d_ff) == (11, 8, 4, 2, 12)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (SIZES["num_layers"], SIZES["num_decoder_layers"])
    assert config.is_sparse == sparse and (not sparse or config.num_experts == SPARSE["num_experts"])
    canonical = read(golden["config"], golden["tensors"])
    assert {path: tensor.shape for path, tensor in canonical.items()} == canonical_shapes(config)


@pytest.mark.parametrize(("theirs", "new"), [("d_model", "hidden_size"), ("num_experts", "n_experts"), ("d_kv", "head_dim")])
def test_a_size_under_a_new_name_is_an_error_that_quotes_it_and_not_the_default(theirs, new):
    config = json.loads(HUGGINGFACE[0].read_text())["config"]
    config[new] = config.pop(theirs)
    with pytest.raises(ConfigError, match=f"no {theirs}, but keys that are not known here: '{new}'"):
        from_huggingface(config)
    assert from_huggingface({**config, theirs: 8}).d_kv  # a key too many is transformers' business


def test_a_tensor_under_a_new_name_is_an_error_that_names_both():
    golden = json.loads(HUGGINGFACE[0].read_text())
    renamed = {name.replace("SelfAttention.q", "self_attn.q_proj"): shape for name, shape in golden["tensors"].items()}
    with pytest.raises(CheckpointError, match=r"SelfAttention\.q\.weight(.|\n)*self_attn\.q_proj"):
        read(golden["config"], renamed)


def test_there_are_goldens_of_the_oldest_and_the_newest():
    names = {file.name for file in Path(FOLDER).glob("*.json")}
    assert {"orbax-0.12.0.json", "orbax-0.12.8.json"} <= names
    for version in ("5.23.0",):
        assert {f"{kind}.transformers-{version}.json" for kind in ("switch_transformers", "t5")} <= names
