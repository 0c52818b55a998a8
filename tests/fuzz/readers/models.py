"""Folders of models, in every format: opened, loaded, converted, inspected."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np

from flax_switch import SwitchConfig, load_pretrained, save_pretrained
from flax_switch.convert import convert
from flax_switch.convert.canonical import canonical_shapes, unflatten
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.inspection.checkpoint import describe, render
from tests.convert import t5x_files
from tests.fuzz.case import Reader

SMALL = SwitchConfig(
    vocab_size=96, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=2, capacity_mode="fixed",
)  # fmt: skip
DENSE = SMALL.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


def flat(config: SwitchConfig = SMALL) -> dict[str, np.ndarray]:
    """Random parameters by canonical name."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in canonical_shapes(config).items()}


@functools.cache
def vocabulary() -> Vocabulary:
    """A vocabulary of 70 pieces and four sentinels."""
    return Vocabulary.train([f"The quick brown fox {i} jumps over the lazy dog." for i in range(200)], 60, num_sentinels=4)


def _huggingface(folder: Path, **options: Any) -> None:
    save_pretrained(folder, SMALL, unflatten(flat()), vocabulary(), **options)
    (folder / "generation_config.json").write_text(
        json.dumps({"max_length": 9, "num_beams": 2, "eos_token_id": [1, 5], "bad_words_ids": [[3, 4]], "suppress_tokens": [7]})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}))


def _sharded(folder: Path) -> None:
    _huggingface(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file()


def _tokenizer_json(folder: Path, **parts: Any) -> None:
    _huggingface(folder)
    (folder / "spiece.model").unlink()
    pieces = [[piece, -float(i)] for i, piece in enumerate(("<pad>", "</s>", "<unk>", "\u2581", "a", "b", "\u2581the"))]
    values = {
        "version": "1.0",
        "added_tokens": [
            dict(id=i, content=text, special=i < 3, normalized=i > 2, lstrip=False, rstrip=False, single_word=False)
            for i, text in ((0, "<pad>"), (1, "</s>"), (2, "<unk>"), (7, "<new>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        **parts,
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))


def _torch_bin(folder: Path, **options: Any) -> None:
    import torch
    from safetensors.torch import load_file

    _huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)


def _flax_msgpack(folder: Path) -> None:
    save_pretrained(folder, DENSE, unflatten(flat(DENSE)), vocabulary())
    from safetensors.numpy import load_file

    renamed = {}
    for name, array in load_file(folder / "model.safetensors").items():
        path = name.replace(".", "/")
        if "layer_norm" in name:
            renamed[path] = array
        elif "shared" in name or "relative_attention_bias" in name:
            renamed[path.removesuffix("weight") + "embedding"] = array
        elif "embed_tokens" not in name:
            renamed[path.removesuffix("weight") + "kernel"] = np.ascontiguousarray(array.T)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(unflatten(renamed)))


def _native(folder: Path) -> None:
    save_pretrained(folder, SMALL, unflatten(flat()), vocabulary(), format="flax_switch")


def _hub(folder: Path) -> None:
    """The layout of the hub's cache: a snapshot of links to blobs."""
    _huggingface(folder / "whole")
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "0", folder / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((folder / "whole").iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (folder / "whole").rmdir()


def read_model(folder: Path, rng: random.Random) -> None:
    """Does with a model's folder one of the things that commands do."""
    kind = rng.randrange(4)
    if kind == 0:
        render(describe(folder))
    elif kind == 1:
        convert(folder, folder.with_name("converted"), to=rng.choice(("huggingface", "flax_switch")), overwrite=True)
    else:
        loaded = load_pretrained(folder)
        if loaded.vocabulary is not None:
            loaded.vocabulary.decode(loaded.vocabulary.encode("The quick <extra_id_0> fox"))


def _of(folder_in: str, read: Callable[[Path, random.Random], None] = read_model) -> Callable[[Path, random.Random], None]:
    return lambda place, rng: read(place / folder_in, rng)


READERS = {
    "huggingface": Reader(_huggingface, read_model),
    "huggingface-config": Reader(_huggingface, read_model, ("config.json", "generation_config.json")),
    "huggingface-tokenizer": Reader(_huggingface, read_model, ("*token*.json", "spiece.model", "vocabulary.json")),
    "huggingface-tensors": Reader(_huggingface, read_model, ("*.safetensors",)),
    "huggingface-shards": Reader(_sharded, read_model, ("*.index.json", "*.safetensors")),
    "tokenizer-json": Reader(_tokenizer_json, read_model, ("tokenizer.json",)),
    "tokenizer-json-foreign": Reader(
        lambda folder: _tokenizer_json(folder, normalizer={"type": "Lowercase"}), read_model, ("tokenizer.json",)
    ),
    "torch-bin": Reader(_torch_bin, read_model, ("*.bin",), warm=True),
    "torch-bin-old": Reader(
        lambda folder: _torch_bin(folder, _use_new_zipfile_serialization=False), read_model, ("*.bin",), warm=True
    ),
    "flax-msgpack": Reader(_flax_msgpack, read_model, ("*.msgpack",)),
    "t5x": Reader(lambda folder: t5x_files.write(folder, flat()), read_model),
    "native": Reader(_native, read_model),
    "hub-cache": Reader(_hub, _of("models--a--b/snapshots/0")),
}  # fmt: skip
