"""Tokenizer files: T5's `spiece.model`, a `tokenizer.json` alone, or ByT5's settings, to our vocabulary and back."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.config import ConfigError, check
from flax_switch.convert.doors import readable
from flax_switch.convert.sentencepiece_proto import KINDS, UNIGRAM, model_proto
from flax_switch.convert.training_run import vocabulary_folder
from flax_switch.host.files import read_bytes
from flax_switch.host.json_text import field, read_json, valid_text

if TYPE_CHECKING:
    from flax_switch.data.vocabulary import AddedToken, Vocabulary

DEFAULT_SENTINELS = 100  # T5's
_SENTINEL = re.compile(r"<extra_id_\d+>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

log = logging.getLogger(__name__)


def load_vocabulary(folder: Path) -> Vocabulary | None:
    """Returns the vocabulary of a model's folder, or None where it has none (or one that is no T5 tokenizer, which is logged).

    Raises `ConfigError` for files that are broken.
    """
    from flax_switch.data.vocabulary import OtherTokenizerError

    folder = vocabulary_folder(folder)
    try:
        with readable(folder):
            return _vocabulary_in(folder)
    except OtherTokenizerError as error:
        log.warning("The tokenizer in %s is not used: %s", folder, error)
    except ConfigError as error:
        raise ConfigError(
            f"The vocabulary in {folder} cannot be used: {error} Put the model's own there, or remove it to go without."
        ) from error
    return None


def _vocabulary_in(folder: Path) -> Vocabulary | None:
    from flax_switch.data.byte_vocabulary import ByteVocabulary
    from flax_switch.data.foreign_vocabulary import ForeignVocabulary
    from flax_switch.data.vocabulary import Vocabulary

    spiece, tokenizer, settings = (folder / name for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"))
    if (folder / "vocabulary.json").is_file():
        return Vocabulary.load(folder)
    if settings.is_file() and read_json(settings).get("tokenizer_class") == "ByT5Tokenizer":
        check(
            not spiece.is_file(),
            f"{settings.name} names ByT5Tokenizer, whose tokens are bytes, beside a spiece.model: one of them is another model's.",
        )
        return ByteVocabulary(read_bytes(settings))
    if not tokenizer.is_file():
        return Vocabulary.from_sentencepiece(spiece, count_sentinels(folder)) if spiece.is_file() else None
    values = read_json(tokenizer)
    strange, vocabulary = strange_parts(values), None
    if not strange and not is_unigram(values) and "<s>" in _vocab(values):
        strange = ["a model that is no unigram"]
    if not strange:
        vocabulary = _unigram(values, spiece if spiece.is_file() else None, folder)
        strange = [f"the token {content!r} with the id {number}" for content, number in other_ids(values, vocabulary)]
    if not strange:
        return vocabulary
    log.info("The tokenizer in %s is run by the package tokenizers: it has %s.", folder, ", ".join(strange[:5]))
    return ForeignVocabulary(read_bytes(tokenizer))


def _unigram(values: Mapping[str, Any], spiece: Path | None, folder: Path) -> Vocabulary:
    """Returns the vocabulary of a `tokenizer.json`, with the model of the `spiece.model` beside it where the two are the same."""
    from flax_switch.data.vocabulary import Vocabulary

    model, sentinels = sentencepiece_model(values)
    if spiece is not None:
        beside = Vocabulary.from_sentencepiece(spiece, 0)
        if _pieces(beside.model) == _pieces(model):
            model, sentinels = beside.model, sentinels or count_sentinels(folder)
        else:
            log.warning("In %s tokenizer.json is another tokenizer than spiece.model, which is not used.", folder)
    return Vocabulary(model, sentinels, users_tokens(values))


def _pieces(model: bytes) -> tuple[list[str], bytes]:
    """Returns a SentencePiece model's pieces, and how it replaces characters."""
    proto = model_proto().FromString(model)
    return [piece.piece for piece in proto.pieces], proto.normalizer_spec.precompiled_charsmap


def other_ids(tokenizer: Mapping[str, Any], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Returns the tokens in a `tokenizer.json`'s list that have other ids there than in a vocabulary."""
    entries = [entry for entry in field(tokenizer, "added_tokens", list, "tokenizer.json", []) if isinstance(entry, dict)]
    found = [(entry["content"], entry["id"]) for entry in entries if isinstance(entry.get("content"), str) and "id" in entry]
    return [(content, number) for content, number in found if vocabulary.encode(content) != [number]]


def users_tokens(tokenizer: Mapping[str, Any]) -> list[AddedToken]:
    """Returns the tokens of a `tokenizer.json` that a user has added to what T5's vocabulary has."""
    from flax_switch.data.vocabulary import added_tokens

    known = {"<pad>", "</s>", "<unk>"}
    entries = [
        entry
        for entry in field(tokenizer, "added_tokens", list, "tokenizer.json", [])
        if not (isinstance(entry, dict) and ((content := str(entry.get("content"))) in known or _SENTINEL.fullmatch(content)))
    ]
    return added_tokens(entries, "tokenizer.json")


# How T5's tokenizers cut text, in the spellings of several versions of transformers. Everything else gives other ids.
_WHITESPACE = {"type": "WhitespaceSplit"}
_NORMALIZERS = (
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
    {"type": "Strip", "strip_left": False, "strip_right": True},
)


def strange_parts(tokenizer: Mapping[str, Any]) -> list[str]:
    """Returns the parts of a `tokenizer.json` that no SentencePiece model has: normalisers, pre-tokenisers, flags of tokens."""
    normalizers, cutters = (
        _parts(tokenizer.get("normalizer"), "normalizers"),
        _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    )
    strange = [f"a normaliser {_shown(p)}" for p in normalizers if p.get("type") != "Precompiled" and p not in _NORMALIZERS]
    strange += [f"a pre-tokeniser {_shown(part)}" for part in cutters if part != _WHITESPACE and not _is_t5s(part)]
    if not strange and is_unigram(tokenizer):
        strange = _strange_blanks([part.get("type") for part in normalizers], cutters)
        number = field(tokenizer, "model", dict, "tokenizer.json", {}).get("unk_id", 2)
        strange += [f"unk_id={_shown(number)}"] if number not in (2, None) else []
        strange += _strange_tokens(tokenizer)
    for token in field(tokenizer, "added_tokens", list, "tokenizer.json", []):
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if isinstance(token, Mapping) and token.get(flag)]
        strange += [f"the added token {token['content']!r} with {flag}" for flag in flags]
    return strange


def _strange_blanks(normalizers: Sequence[Any], cutters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what treats blanks otherwise than T5, which cuts at them, all kinds made one by the character map; or joins them."""
    if [part == _WHITESPACE for part in cutters] not in ([False], [True, False]):
        return [f"the pre-tokenisers {_shown(cutters)}"]
    wanted = ("Precompiled",) if len(cutters) == 2 else ("Replace", "Strip")
    return [f"no normaliser {kind}, so that it keeps blanks" for kind in wanted if kind not in normalizers]


def _strange_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    """Returns the sentinels and control tokens that are pieces like others, or that are looked for in text that is normalised.

    Also what gives added tokens other ids than the file says: `tokenizers` counts them on from the pieces, in their order.
    """
    entries = [entry for entry in field(tokenizer, "added_tokens", list, "tokenizer.json", []) if isinstance(entry, dict)]
    normalized = {str(entry.get("content")): bool(entry.get("normalized", False)) for entry in entries}
    pieces = [str(pair[0]) for pair in tokenizer["model"]["vocab"] if isinstance(pair, list) and pair]
    known = [*pieces[:3], *(piece for piece in pieces[3:] if _SENTINEL.fullmatch(piece))]
    strange = [
        f"{piece} as {'normalised' if piece in normalized else 'plain'} text" for piece in known if normalized.get(piece, True)
    ]
    there = set(pieces)
    new = [entry.get("id") for entry in entries if str(entry.get("content")) not in there]
    return strange if new == [*range(len(pieces), len(pieces) + len(new))] else [*strange, "gaps in the ids of added tokens"]


def _vocab(tokenizer: Mapping[str, Any]) -> Any:
    vocab = field(tokenizer, "model", dict, "tokenizer.json", {}).get("vocab")
    return vocab if isinstance(vocab, (dict, list)) else ()


def is_unigram(tokenizer: Mapping[str, Any]) -> bool:
    """Returns whether a `tokenizer.json`'s model is of the kind of T5's."""
    model = field(tokenizer, "model", dict, "tokenizer.json", {})
    vocab = model.get("vocab")
    return model.get("type", "Unigram") == "Unigram" and isinstance(vocab, list) and len(vocab) >= 3


def _is_t5s(part: Mapping[str, Any]) -> bool:
    always = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") == "always"
    return part.get("type") == "Metaspace" and part.get("replacement") == "\u2581" and always and part.get("split", True) is True


def _parts(value: Any, plural: str) -> list[Mapping[str, Any]]:
    """Returns the parts of a sequence of them, of one, or of none."""
    if value is None:
        return []
    parts = value.get(plural, [value]) if isinstance(value, Mapping) else [value]
    check(
        isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts),
        f"tokenizer.json: {plural} must be objects; they are {_shown(parts)}",
    )
    return [inner for part in parts for inner in (_parts(part, plural) if plural in part else [part])]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def count_sentinels(folder: Path) -> int:
    """Returns how many sentinels a folder's tokenizer_config.json asks for; T5's 100 where it does not say."""
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    if values.get("extra_ids") is not None:
        return field(values, "extra_ids", int, str(path))
    named = field(values, "additional_special_tokens", (list, type(None)), str(path), []) or []
    texts = [token if isinstance(token, str) else str(token.get("content")) for token in named if isinstance(token, str | dict)]
    return sum(1 for text in texts if _SENTINEL.fullmatch(text)) or DEFAULT_SENTINELS


def tokenizer_config(num_sentinels: int, added: Sequence[AddedToken] = ()) -> bytes:
    """Returns the tokenizer_config.json that makes AutoTokenizer open a `spiece.model` as T5's, with sentinels and added tokens."""
    values: dict[str, Any] = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": num_sentinels,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(num_sentinels)],
    }
    if added:
        flags = dict(lstrip=False, rstrip=False, single_word=False)
        entries = {str(t.id): dict(content=t.content, special=t.special, normalized=t.normalized, **flags) for t in added}
        values["added_tokens_decoder"] = entries
    return (json.dumps(values, indent=2) + "\n").encode()


def vocabulary_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Returns the files of a vocabulary: ours, and what transformers needs beside `spiece.model`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if vocabulary.file_name == "tokenizer_config.json":
        return files
    if vocabulary.file_name != "spiece.model":
        values = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
        return {**files, "tokenizer_config.json": (json.dumps(values, indent=2) + "\n").encode()}
    return {**files, "tokenizer_config.json": tokenizer_config(vocabulary.num_sentinels, vocabulary.added)}


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
    from flax_switch.data.vocabulary import OtherTokenizerError

    model = field(tokenizer, "model", dict, "tokenizer.json", {})
    if not is_unigram(tokenizer):
        raise OtherTokenizerError("tokenizer.json holds no unigram model, which T5's tokenizer is")
    try:
        pieces = [(valid_text(str(piece)), float(score)) for piece, score in model["vocab"]]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"tokenizer.json: the vocabulary must be pairs of text and score ({error})") from error
    entries = field(tokenizer, "added_tokens", list, "tokenizer.json", [])
    added = {str(token.get("content")) for token in entries if isinstance(token, dict)}
    while pieces and _SENTINEL.fullmatch(pieces[-1][0]):
        added.add(pieces.pop()[0])
    spm = model_proto()()
    special = {"<pad>": KINDS.CONTROL, "</s>": KINDS.CONTROL, "<unk>": KINDS.UNKNOWN}
    for i, (piece, score) in enumerate(pieces):
        kind = special.get(piece, KINDS.NORMAL) if i < 3 else KINDS.NORMAL
        if model.get("byte_fallback") and _BYTE.fullmatch(piece):
            kind = KINDS.BYTE
        spm.pieces.add(piece=piece, score=score, type=kind)
    spm.trainer_spec.byte_fallback = bool(model.get("byte_fallback"))
    spm.trainer_spec.model_type = UNIGRAM
    spm.trainer_spec.vocab_size = len(pieces)
    spm.trainer_spec.pad_id, spm.trainer_spec.eos_id, spm.trainer_spec.unk_id, spm.trainer_spec.bos_id = 0, 1, 2, -1
    spm.normalizer_spec.name = "nmt_nfkc"
    spm.normalizer_spec.precompiled_charsmap = _charsmap(tokenizer.get("normalizer"))
    return spm.SerializeToString(), sum(1 for text in added if _SENTINEL.fullmatch(text))


def _charsmap(normalizer: Any) -> bytes:
    """Returns the precompiled character map among a tokenizer.json's normalisers; none means the text stays as it is."""
    for part in _parts(normalizer, "normalizers"):
        if part.get("type") == "Precompiled":
            try:
                return base64.b64decode(field(part, "precompiled_charsmap", str, "tokenizer.json"), validate=True)
            except binascii.Error as error:
                raise ConfigError(f"tokenizer.json: the precompiled character map is no base64 ({error})") from error
    return b""
