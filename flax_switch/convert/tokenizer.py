"""Tokenizer files: T5's `spiece.model`, or a `tokenizer.json` alone, to our vocabulary, and back for AutoTokenizer."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.config import ConfigError
from flax_switch.convert.training_run import vocabulary_folder

if TYPE_CHECKING:
    from flax_switch.data.vocabulary import Vocabulary

DEFAULT_SENTINELS = 100  # T5's
_SENTINEL = re.compile(r"<extra_id_\d+>")

log = logging.getLogger(__name__)


def load_vocabulary(folder: Path) -> Vocabulary | None:
    """Returns the vocabulary of a model's folder, or None where it has none (or one that is no T5 tokenizer, which is logged)."""
    from flax_switch.data.vocabulary import Vocabulary

    folder = vocabulary_folder(folder)
    spiece, tokenizer = folder / "spiece.model", folder / "tokenizer.json"
    try:
        if (folder / "vocabulary.json").is_file():
            return Vocabulary.load(folder)
        if spiece.is_file():
            return Vocabulary.from_sentencepiece(spiece, count_sentinels(folder))
        if tokenizer.is_file():
            model, num_sentinels = sentencepiece_model(json.loads(tokenizer.read_text(encoding="utf-8")))
            return Vocabulary.from_sentencepiece(model, num_sentinels)
    except (ConfigError, json.JSONDecodeError, UnicodeDecodeError) as error:
        log.warning("The tokenizer in %s is not used: %s", folder, error)
    return None


def count_sentinels(folder: Path) -> int:
    """Returns how many sentinels a folder's tokenizer_config.json asks for; T5's 100 where it does not say."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "extra_ids" in values:
        return int(values["extra_ids"])
    named = values.get("additional_special_tokens") or []
    texts = [token if isinstance(token, str) else token.get("content", "") for token in named]
    return sum(1 for text in texts if _SENTINEL.fullmatch(text)) or DEFAULT_SENTINELS


def tokenizer_config(num_sentinels: int) -> bytes:
    """Returns the tokenizer_config.json that makes AutoTokenizer open a `spiece.model` as T5's, with this many sentinels."""
    values = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": num_sentinels,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(num_sentinels)],
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def vocabulary_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Returns the files of a vocabulary: ours, and what transformers needs beside `spiece.model`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {**files, "tokenizer_config.json": tokenizer_config(vocabulary.num_sentinels)}


def complete_files(files: Mapping[str, bytes], folder: Path) -> dict[str, bytes]:
    """Returns tokenizer files with the tokenizer_config.json that transformers needs, where a `spiece.model` lacks it."""
    if "spiece.model" not in files or "tokenizer_config.json" in files:
        return dict(files)
    vocabulary = load_vocabulary(folder)
    sentinels = DEFAULT_SENTINELS if vocabulary is None else vocabulary.num_sentinels
    return {**files, "tokenizer_config.json": tokenizer_config(sentinels)}


def sentencepiece_model(tokenizer: Mapping[str, Any]) -> tuple[bytes, int]:
    """Returns a `tokenizer.json` of the unigram kind as a serialised SentencePiece model and a number of sentinels.

    Pieces and scores are the same; the sentinels at the end of the vocabulary are no pieces of the model.

    Raises:
      ConfigError: if it is no unigram tokenizer with T5's first three pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # protocol buffers make its classes when it is imported
    model = tokenizer.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type", "Unigram") != "Unigram" or not isinstance(vocab, list) or len(vocab) < 3:
        raise ConfigError("tokenizer.json holds no unigram model, which T5's tokenizer is")
    pieces = [(str(piece), float(score)) for piece, score in vocab]
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    while pieces and _SENTINEL.fullmatch(pieces[-1][0]):
        added.add(pieces.pop()[0])
    spm = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    special = {"<pad>": kinds.CONTROL, "</s>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}
    for i, (piece, score) in enumerate(pieces):
        spm.pieces.add(piece=piece, score=score, type=special.get(piece, kinds.NORMAL) if i < 3 else kinds.NORMAL)
    spm.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    spm.trainer_spec.vocab_size = len(pieces)
    spm.trainer_spec.pad_id, spm.trainer_spec.eos_id, spm.trainer_spec.unk_id, spm.trainer_spec.bos_id = 0, 1, 2, -1
    spm.normalizer_spec.name = "nmt_nfkc"
    spm.normalizer_spec.precompiled_charsmap = _charsmap(tokenizer.get("normalizer"))
    return spm.SerializeToString(), sum(1 for text in added if _SENTINEL.fullmatch(text))


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes:
    """Returns the precompiled character map among a tokenizer.json's normalisers; none means the text stays as it is."""
    if not normalizer:
        return b""
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return b""
