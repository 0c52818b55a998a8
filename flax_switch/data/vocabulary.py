"""The vocabulary: SentencePiece with T5's ids (pad 0, EOS 1, unk 2) and sentinels that count down from the top.

A vocabulary is a SentencePiece model and a number of sentinels. The sentinels are no pieces of the model: as in T5, they are
appended after its last piece, `<extra_id_0>` having the highest id, so the same `.model` file serves any number of them and
training a model needs no reserved symbols.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.data.encoding import Encoding, as_arrays, encode_texts, rows_of
from flax_switch.host import files
from flax_switch.host.json_text import field, read_json, valid_text

MODEL_FILE = "spiece.model"
SETTINGS_FILE = "vocabulary.json"
_SPECIAL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,5})>|</s>|<pad>|<unk>")
MOST_SENTINELS = 100_000  # T5 has 100
_TRAINING_CHARACTERS = 20_000_000  # more text does not change a vocabulary, only the time it takes
_TRAINING_LINE = 4000  # characters; SentencePiece leaves longer lines out


class OtherTokenizerError(ConfigError):
    """A tokenizer that is whole, but that cannot be used here: it is of another kind than T5's, or needs a package."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that a user added to a tokenizer: wherever its text stands, it is this id, whatever stands around it.

    special: left out of decoded text like EOS. normalized: looked for in the text as SentencePiece normalises it.
    """

    content: str
    id: int
    special: bool = False
    normalized: bool = True


class Vocabulary:
    """Text to token ids and back. Ids: pad 0, EOS 1, unk 2, pieces, then the sentinels in descending order, then added tokens."""

    file_name = MODEL_FILE
    pad_id = 0
    eos_id = 1
    unk_id = 2
    languages: Mapping[str, int] = MappingProxyType({})  # ids of the tokens that name the language of a text

    def __init__(self, model: bytes, num_sentinels: int = 100, added: Sequence[AddedToken] = ()):
        """Takes a serialised SentencePiece model; see `from_sentencepiece`."""
        check(0 <= num_sentinels <= MOST_SENTINELS, f"num_sentinels must lie in [0, {MOST_SENTINELS}]; it is {num_sentinels}.")
        self.model = model
        self.num_sentinels = num_sentinels
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ConfigError("This is no SentencePiece model, or a damaged one.") from error
        self.num_pieces = self._pieces.GetPieceSize()
        self._check_ids()
        self.added = tuple(sorted(added, key=lambda token: token.id))
        self._added = {token.id: token for token in self.added}
        self._exact = _finder([token for token in self.added if not token.normalized], _SPECIAL.pattern)
        self._normalized = _finder([token for token in self.added if token.normalized])

    def _check_ids(self) -> None:
        for name, expected, found in (
            ("pad", self.pad_id, self._pieces.pad_id()),
            ("EOS", self.eos_id, self._pieces.eos_id()),
            ("unk", self.unk_id, self._pieces.unk_id()),
        ):
            check(
                found == expected,
                f"The SentencePiece model has {name} id {found if found >= 0 else 'none'}, but T5's ids are needed: pad 0, "
                "EOS 1, unk 2. Train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1, or let data.vocabulary=None train one.",
            )
        for i in range(self.num_sentinels):
            check(
                self._pieces.PieceToId(f"<extra_id_{i}>") == self.unk_id,
                f"The SentencePiece model already holds a piece <extra_id_{i}>, and {self.num_sentinels} sentinels would be "
                "appended a second time; set num_sentinels=0 or take a model without them.",
            )

    # --- making one
    @classmethod
    def from_sentencepiece(
        cls, model: bytes | epath.PathLike, num_sentinels: int = 100, added: Sequence[AddedToken] = ()
    ) -> Vocabulary:
        """Makes a vocabulary from a SentencePiece model: its bytes, or the path of a `.model` file such as T5's `spiece.model`.

        Raises `ConfigError` where the file cannot be read, is no such model, or its ids are not T5's.
        """
        if not isinstance(model, bytes):
            model = files.read_bytes(model if files.in_store(model) else files.expanded(model))
        return cls(model, num_sentinels, added)

    @classmethod
    def train(cls, documents: Iterable[str], size: int, num_sentinels: int = 100) -> Vocabulary:
        """Trains a unigram model of `size` pieces (control symbols included, sentinels not) on the documents.

        Takes the first 20 million characters. Raises `ConfigError` where the text is empty or too small for `size` pieces.
        """
        unreadable: list[Exception] = []  # what reading the corpus raises, the trainer would report as its own failure

        def lines() -> Iterator[str]:
            try:
                yield from _limited(documents)
            except Exception as error:
                unreadable.append(error)
                raise

        remaining = lines()
        first = next(remaining, None)
        check(first is not None, "A vocabulary cannot be trained on an empty corpus.")
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=itertools.chain([first], remaining),
                model_writer=written,
                model_type="unigram",
                vocab_size=size,
                pad_id=cls.pad_id,
                eos_id=cls.eos_id,
                unk_id=cls.unk_id,
                bos_id=-1,
                character_coverage=0.9999,
                max_sentence_length=4 * _TRAINING_LINE,
                byte_fallback=False,
                num_threads=8,  # a fixed number, as sums over threads depend on it
                minloglevel=2,
            )
        except RuntimeError as error:
            if unreadable:
                raise unreadable[0] from None
            most = re.search(r"value <= (\d+)", str(error))
            advice = f"this corpus has text for {most[1]} at most; lower data.vocabulary_size" if most else str(error)
            raise ConfigError(f"A vocabulary of {size} pieces cannot be trained: {advice}.") from error
        return cls(written.getvalue(), num_sentinels)

    # --- sizes and ids
    @property
    def size(self) -> int:
        """One more than the highest id: pieces, sentinels and, if there are any, added tokens."""
        return max([self._end_of_sentinels, *(token.id + 1 for token in self.added)])

    @property
    def _end_of_sentinels(self) -> int:
        return self.num_pieces + self.num_sentinels

    @functools.cached_property
    def word_starts(self) -> np.ndarray:
        """Which pieces begin a word, [num_pieces]: those after a space, and marks such as a full stop."""
        pieces = [self._pieces.IdToPiece(i) for i in range(self.num_pieces)]
        return np.array([not piece[:1].isalnum() for piece in pieces])  # "▁" is no letter

    @property
    def padded_size(self) -> int:
        """`size` rounded up to a multiple of 128: what `SwitchConfig.vocab_size` should be."""
        return -(-self.size // 128) * 128

    def sentinel_id(self, i: int) -> int:
        """Returns the id of `<extra_id_i>`: the top id for 0, one less for each next."""
        check(0 <= i < self.num_sentinels, f"There are {self.num_sentinels} sentinels; <extra_id_{i}> is not one of them.")
        return self._end_of_sentinels - 1 - i

    @property
    def fingerprint(self) -> str:
        """Changes with the pieces, the number of sentinels and the added tokens."""
        digest = hashlib.blake2b(self.model, digest_size=8)
        digest.update(f"sentinels {self.num_sentinels}".encode())
        if self.added:
            digest.update(repr(self.added).encode())
        return digest.hexdigest()

    # --- text to ids and back
    def encode(self, text: str) -> list[int]:
        """Returns token ids of a text, without EOS, equal to transformers' T5Tokenizer's.

        `<extra_id_i>` in the text becomes the sentinel's id, `</s>`, `<pad>` and `<unk>` theirs, and an added token its own.
        """
        text = valid_text(text)
        ids: list[int] = []
        end = 0
        for match in (self._exact or _SPECIAL).finditer(text):
            special = self._special_id(match)
            if special is not None:
                ids += self._plain_ids(text[end : match.start()])
                ids.append(special)
                end = match.end()
        return ids + self._plain_ids(text[end:])

    def encode_source(self, text: str) -> list[int]:
        """Returns token ids of a text as a model reads it, without EOS: where texts have languages, its language's first."""
        return self.encode(text)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Returns `input_ids` and `attention_mask` of a text, or of each of several, as transformers' T5 tokenizer does.

        Args:
          text: one text gives lists of tokens, several give lists of lists.
          text_target: targets; their ids are the encoding's `labels`, or its `input_ids` where there is no `text`. Padding in
            labels is the pad token, as in transformers: put -100 there for a loss that shall not count it.
          padding: True or "longest" fills rows up to the longest with pad, "max_length" up to max_length.
          truncation: True cuts rows to max_length, EOS included.
          pad_to_multiple_of: rounds the length that rows are filled up to, so that fewer programs compile.
          add_special_tokens: close every text with EOS.
          return_tensors: "np" for arrays [rows, tokens], one row for one text.

        Raises:
          ConfigError: naming the option that cannot be, or that needs another.
        """
        check(text is not None or text_target is not None, "Give a text, or text_target.")
        options: dict[str, Any] = dict(
            eos_id=self.eos_id if add_special_tokens else None, pad_id=self.pad_id, padding=padding, truncation=truncation,
            max_length=max_length, pad_to_multiple_of=pad_to_multiple_of,
        )  # fmt: skip
        encoding = Encoding()
        if text is not None:
            encoding["input_ids"], encoding["attention_mask"] = encode_texts(self.encode_source, text, **options)
        if text_target is not None:
            ids, mask = encode_texts(self.encode, text_target, **options)
            encoding |= {"labels": ids} if text is not None else {"input_ids": ids, "attention_mask": mask}
        return as_arrays(encoding, return_tensors)

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of text between special tokens."""
        if self._normalized is None:
            return self._pieces.EncodeAsIds(text)
        ids: list[int] = []
        end, text = 0, self._normalizer.normalize(text)
        for match in self._normalized.finditer(text):
            ids += [*self._pieces.EncodeAsIds(text[end : match.start()]), self._id_of[match[0]]]
            end = match.end()
        return ids + self._pieces.EncodeAsIds(text[end:])

    @functools.cached_property
    def _id_of(self) -> dict[str, int]:
        return {token.content: token.id for token in self.added}

    @functools.cached_property
    def _normalizer(self) -> Any:
        """Replaces characters as SentencePiece does, and leaves blanks as they are."""
        options: Any = dict(add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False)
        return sentencepiece.SentencePieceNormalizer(model_proto=self.model, **options)

    def _special_id(self, match: re.Match[str]) -> int | None:
        if match[0] in self._id_of:
            return self._id_of[match[0]]
        if match[1] is None:
            return {"<pad>": self.pad_id, "</s>": self.eos_id, "<unk>": self.unk_id}[match[0]]
        return self.sentinel_id(int(match[1])) if int(match[1]) < self.num_sentinels else None

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel. Sentinels in them are plain characters here: corpus text has none."""
        if self.added:
            return [self.encode(text) for text in documents]
        return self._pieces.Encode([valid_text(text) for text in documents], out_type=int, num_threads=-1)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids. Special tokens (pad, EOS, unk, sentinels, ids past the end) are left out or named.

        As in transformers' T5 tokenizer, a name follows what comes before it without a space: `Thank you<extra_id_0> me</s>`.
        """
        shown = [i for i in map(int, ids) if not (skip_special_tokens and self._is_special(i))]
        texts = []
        for in_bytes, run in itertools.groupby(shown, key=self._is_byte):
            if in_bytes:  # of models with byte_fallback: "<0xE6>" is a byte of a character that is no piece
                content = bytes(int(self._pieces.IdToPiece(i)[1:-1], 16) for i in run)
                texts.append(valid_text(content.decode("utf-8", "surrogateescape")))  # U+FFFD for each byte of half a character
            else:
                texts += [self._text_of(i) for i in run]
        return "".join(texts).removeprefix(" ")

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """Returns the text of each row of ids, which may be lists or the arrays of any library; see `decode`."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows_of(sequences)]

    def _is_byte(self, i: int) -> bool:
        return 0 <= i < self.num_pieces and self._pieces.IsByte(i)

    def _is_special(self, i: int) -> bool:
        if i in self._added:
            return self._added[i].special
        return i in (self.pad_id, self.eos_id, self.unk_id) or not 0 <= i < self.num_pieces

    def _text_of(self, i: int) -> str:
        if i in self._added:
            return self._added[i].content
        return self._special_name(i) if self._is_special(i) else self._pieces.IdToPiece(i).replace("\u2581", " ")

    def _special_name(self, i: int) -> str:
        if self.num_pieces <= i < self._end_of_sentinels:
            return f"<extra_id_{self._end_of_sentinels - 1 - i}>"
        return self._pieces.IdToPiece(i if 0 <= i < self.num_pieces else self.unk_id)

    def __repr__(self) -> str:
        return f"{self.num_pieces} pieces and {self.num_sentinels} sentinels (fingerprint {self.fingerprint})"

    # --- on disk
    def save(self, folder: epath.PathLike) -> None:
        """Writes `spiece.model` (or the file of another kind of vocabulary) and a small `vocabulary.json` into the folder."""
        files.write_bytes(epath.Path(folder) / self.file_name, self.model)
        settings: dict[str, Any] = {"num_sentinels": self.num_sentinels, "size": self.size, "fingerprint": self.fingerprint}
        if self.file_name != MODEL_FILE:
            settings["file"] = self.file_name
        if self.added:
            settings["added_tokens"] = [dataclasses.asdict(token) for token in self.added]
        files.write_text(epath.Path(folder) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: epath.PathLike) -> Vocabulary:
        """Returns the inverse of `save`. Raises `ConfigError` where files are missing or do not belong together."""
        path = epath.Path(folder) / SETTINGS_FILE
        try:
            settings = read_json(path)
            sentinels = field(settings, "num_sentinels", int, str(path))
            added = added_tokens(field(settings, "added_tokens", list, str(path), []), str(path))
            if "file" in settings:
                from flax_switch.data.byte_vocabulary import ByteVocabulary
                from flax_switch.data.foreign_vocabulary import ForeignVocabulary

                kind = ByteVocabulary if settings["file"] == ByteVocabulary.file_name else ForeignVocabulary
                vocabulary = kind(files.read_bytes(epath.Path(folder) / kind.file_name))
            else:
                vocabulary = cls.from_sentencepiece(epath.Path(folder) / MODEL_FILE, sentinels, added)
        except OtherTokenizerError:
            raise
        except ConfigError as error:
            raise ConfigError(f"{folder} holds no saved vocabulary: {error}") from error
        check(
            vocabulary.fingerprint == settings.get("fingerprint"),
            f"{folder}: {vocabulary.file_name} and {SETTINGS_FILE} do not belong together; copy both from the same run.",
        )
        return vocabulary


def added_tokens(entries: Sequence[Any], where: str) -> list[AddedToken]:
    """Returns the tokens of a list in a tokenizer's file.

    Raises `ConfigError` that names a token which takes blanks around it or whole words alone: those are not supported.
    """
    found = []
    for entry in entries:
        check(isinstance(entry, dict), f"{where}: added tokens must be objects; one is {shown(entry)}.")
        content, number = field(entry, "content", str, where), field(entry, "id", int, where)
        for flag in ("lstrip", "rstrip", "single_word"):
            check(
                not field(entry, flag, bool, where, False),
                f"{where}: the added token {shown(content)} has {flag}, which is not supported.",
            )
        check(bool(content) and number >= 0, f"{where}: an added token needs a text and an id; this is {shown(entry)}.")
        found.append(
            AddedToken(content, number, field(entry, "special", bool, where, False), field(entry, "normalized", bool, where, True))
        )
    return found


def _finder(tokens: Sequence[AddedToken], *others: str) -> re.Pattern[str] | None:
    """Matches added tokens, the longest first, and other patterns; None where there is no token."""
    contents = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, contents), *others])) if contents else None


def _limited(documents: Iterable[str]) -> Iterator[str]:
    """Yields lines short enough for the trainer, until there is text enough."""
    characters = 0
    for document in documents:
        for start in range(0, len(document), _TRAINING_LINE):
            line = valid_text(document[start : start + _TRAINING_LINE]).replace("\n", " ").strip()
            if line:
                yield line
                characters += len(line)
        if characters > _TRAINING_CHARACTERS:
            return
