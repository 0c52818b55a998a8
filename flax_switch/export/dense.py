"""Dense models for runtimes that know T5 and no experts: CTranslate2, and what llama.cpp's converter reads."""

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_switch.config import check
from flax_switch.config.huggingface_nllb import is_nllb
from flax_switch.convert.checkpoint import Checkpoint, companion_files, write_checkpoint
from flax_switch.convert.folder import write_folder
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.export.programs import check_translates

_RUNTIMES = {"ctranslate2": "CTranslate2", "gguf-ready": "llama.cpp"}
# What the runtimes compute in an MLP.
_ACTIVATIONS = {
    "ctranslate2": {(name, *gate) for name in ("relu", "gelu", "gelu_new", "silu", "swish") for gate in ((), ("linear",))},
    "gguf-ready": {("relu",), ("gelu_new", "linear")},
}
_DISTANCE = 128  # beyond which llama.cpp's relative positions are all alike, whatever config.json says


def check_dense(checkpoint: Checkpoint, to: str) -> None:
    """Raises `ConfigError` for a model that the runtime cannot hold, naming what it is of it and the way out."""
    config, runtime = checkpoint.config, _RUNTIMES[to]
    check_translates(config)
    sparse = sum(stack.num_sparse for stack in config.stacks)
    check(
        not config.is_sparse,
        f"{runtime} has no experts, and {sparse} of this model's layers are made of them. Distil it into a dense one (flax-switch "
        "distill), which is exported; --to stablehlo holds experts.",
    )
    check(
        not is_nllb(config),
        f"norm={config.norm!r} and positions={config.positions!r}: {runtime} is given models of T5's form. --to stablehlo holds "
        "this one.",
    )
    check(
        checkpoint.architecture == "full",
        f"{runtime} generates text, for which this checkpoint ({checkpoint.architecture!r}) lacks a head or a whole decoder. "
        "Export the whole model.",
    )
    check(
        config.mlp_activations in _ACTIVATIONS[to],
        f"mlp_activations={config.mlp_activations!r}: {runtime}'s T5 has "
        f"{', '.join(map(repr, sorted(_ACTIVATIONS[to])))}. Train with one of them, or use --to stablehlo.",
    )
    if to == "gguf-ready":
        distance = config.relative_attention_max_distance
        check(
            distance == _DISTANCE,
            f"relative_attention_max_distance={distance}: llama.cpp takes {_DISTANCE} for it. Use --to stablehlo or ctranslate2.",
        )


def write_gguf_ready(checkpoint: Checkpoint, destination: Path, **options: Any) -> Path:
    """Writes the folder that llama.cpp's convert_hf_to_gguf.py reads: safetensors, config.json, spiece.model, added_tokens.json.

    Raises `ConfigError` for what llama.cpp cannot hold.
    """
    check_dense(checkpoint, "gguf-ready")
    vocabulary = load_vocabulary(checkpoint.path)
    check(
        vocabulary is not None and vocabulary.file_name == "spiece.model",
        f"{checkpoint.path} has no spiece.model, the one vocabulary that llama.cpp's converter reads of a T5.",
    )
    assert vocabulary is not None
    sentinels = {f"<extra_id_{i}>": vocabulary.sentinel_id(i) for i in range(vocabulary.num_sentinels)}
    added = sentinels | {token.content: token.id for token in vocabulary.added}
    files = {**companion_files(checkpoint.path), "added_tokens.json": (json.dumps(added, indent=2) + "\n").encode()}
    return write_checkpoint(checkpoint, destination, to="huggingface", files=files, **options)


def write_ctranslate2(checkpoint: Checkpoint, destination: Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Writes the folder that `ctranslate2.Translator` opens, by CTranslate2's converter, with the vocabulary's files beside it.

    Raises:
      ConfigError: for what CTranslate2 cannot hold.
      ImportError: without CTranslate2 or transformers, which its converter reads models with.
    """
    check_dense(checkpoint, "ctranslate2")
    check(load_vocabulary(checkpoint.path) is not None, f"{checkpoint.path} has no vocabulary, by which CTranslate2 names tokens.")
    companions = companion_files(checkpoint.path)
    with tempfile.TemporaryDirectory(prefix="flax-switch-export-") as folder:
        read, written = Path(folder) / "model", Path(folder) / "converted"
        write_checkpoint(checkpoint, read, to="huggingface", files=companions, **options)
        _convert(read, written)
        files = {path.name: path.read_bytes() for path in written.iterdir()}
        write_folder(destination, {}, {**_own(companions), **files}, overwrite=overwrite)
    return destination


def _own(companions: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in companions.items() if name in ("spiece.model", "tokenizer.json")}


def _convert(read: Path, written: Path) -> None:
    try:
        converters: Any = importlib.import_module("ctranslate2.converters")
        from transformers import T5Tokenizer
    except ImportError as error:
        raise ImportError("Writing for CTranslate2 needs pip install 'flax_switch[ctranslate2]'.") from error

    class Converter(converters.TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, path: str, **options: Any) -> Any:
            """Opens a `spiece.model` as T5's in UMT5's folders, too, where transformers' AutoTokenizer does not."""
            return (T5Tokenizer if (read / "spiece.model").is_file() else tokenizer_class).from_pretrained(path, **options)

    Converter(str(read)).convert(str(written))
