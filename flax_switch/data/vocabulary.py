"""The vocabulary: SentencePiece with T5's ids (pad 0, EOS 1, unk 2) and sentinels that count down from the top.

A vocabulary is a SentencePiece model and a number of sentinels. The sentinels are no pieces of the model: as in T5, they are
appended after its last piece, `<extra_id_0>` having the highest id, so the same `.model` file serves any number of them and
training a model needs no reserved symbols.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.host import files

MODEL_FILE = "spiece.model"
SETTINGS_FILE = "vocabulary.json"
_SPECIAL = re.compile(r"<extra_id_(0|[1-9]\d*)>|</s>|<pad>|<unk>")
_TRAINING_CHARACTERS = 20_000_000  # more text does not change a vocabulary, only the time it takes
_TRAINING_LINE = 4000  # characters; SentencePiece leaves longer lines out


class Vocabulary:
    """Text to token ids and back. Ids: pad 0, EOS 1, unk 2, pieces, then the sentinels in descending order."""

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(self, model: bytes, num_sentinels: int = 100):
        """Takes a serialised SentencePiece model; see `from_sentencepiece`."""
        check(num_sentinels >= 0, f"num_sentinels must not be negative; it is {num_sentinels}.")
        self.model = model
        self.num_sentinels = num_sentinels
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ConfigError(f"This is no SentencePiece model: {error}") from error
        self.num_pieces = self._pieces.GetPieceSize()
        self._check_ids()

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
    def from_sentencepiece(cls, model: bytes | epath.PathLike, num_sentinels: int = 100) -> Vocabulary:
        """Returns a vocabulary from a SentencePiece model: its bytes, or the path of a `.model` file such as T5's `spiece.model`.

        Raises `ConfigError` where the file cannot be read, is no such model, or its ids are not T5's.
        """
        if not isinstance(model, bytes):
            try:
                model = epath.Path(model).expanduser().read_bytes()
            except OSError as error:
                raise ConfigError(f"Cannot read the SentencePiece model {model}: {error.strerror or error}.") from error
        return cls(model, num_sentinels)

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
        """Pieces and sentinels."""
        return self.num_pieces + self.num_sentinels

    @property
    def padded_size(self) -> int:
        """`size` rounded up to a multiple of 128: what `SwitchConfig.vocab_size` should be."""
        return -(-self.size // 128) * 128

    def sentinel_id(self, i: int) -> int:
        """Returns the id of `<extra_id_i>`: the top id for 0, one less for each next."""
        check(0 <= i < self.num_sentinels, f"There are {self.num_sentinels} sentinels; <extra_id_{i}> is not one of them.")
        return self.size - 1 - i

    @property
    def fingerprint(self) -> str:
        """Changes with the pieces and the number of sentinels."""
        digest = hashlib.blake2b(self.model, digest_size=8)
        digest.update(f"sentinels {self.num_sentinels}".encode())
        return digest.hexdigest()

    # --- text to ids and back
    def encode(self, text: str) -> list[int]:
        """Returns token ids of a text, without EOS, equal to transformers' T5Tokenizer's.

        `<extra_id_i>` in the text becomes the sentinel's id, and `</s>`, `<pad>` and `<unk>` theirs.
        """
        ids: list[int] = []
        end = 0
        for match in _SPECIAL.finditer(text):
            special = self._special_id(match)
            if special is not None:
                ids += self._pieces.EncodeAsIds(text[end : match.start()])
                ids.append(special)
                end = match.end()
        return ids + self._pieces.EncodeAsIds(text[end:])

    def _special_id(self, match: re.Match[str]) -> int | None:
        if match[1] is None:
            return {"<pad>": self.pad_id, "</s>": self.eos_id, "<unk>": self.unk_id}[match[0]]
        return self.sentinel_id(int(match[1])) if int(match[1]) < self.num_sentinels else None

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Returns token ids of many texts, in parallel. Sentinels in them are plain characters here: corpus text has none."""
        return self._pieces.Encode(list(documents), out_type=int, num_threads=-1)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids. Special tokens (pad, EOS, unk, sentinels, ids past the end) are left out or named.

        As in transformers' T5 tokenizer, a name follows what comes before it without a space: `Thank you<extra_id_0> me</s>`.
        """
        text = "".join(
            self._special_name(i) if self._is_special(i) else self._pieces.IdToPiece(i).replace("\u2581", " ")
            for i in map(int, ids)
            if not (skip_special_tokens and self._is_special(i))
        )
        return text.removeprefix(" ")

    def _is_special(self, i: int) -> bool:
        return i in (self.pad_id, self.eos_id, self.unk_id) or not 0 <= i < self.num_pieces

    def _special_name(self, i: int) -> str:
        if self.num_pieces <= i < self.size:
            return f"<extra_id_{self.size - 1 - i}>"
        return self._pieces.IdToPiece(i if 0 <= i < self.num_pieces else self.unk_id)

    def __repr__(self) -> str:
        return f"{self.num_pieces} pieces and {self.num_sentinels} sentinels (fingerprint {self.fingerprint})"

    # --- on disk
    def save(self, folder: epath.PathLike) -> None:
        """Writes `spiece.model` and a small `vocabulary.json` into the folder."""
        files.write_bytes(epath.Path(folder) / MODEL_FILE, self.model)
        settings = {"num_sentinels": self.num_sentinels, "size": self.size, "fingerprint": self.fingerprint}
        files.write_text(epath.Path(folder) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: epath.PathLike) -> Vocabulary:
        """Returns the inverse of `save`. Raises `ConfigError` where files are missing or do not belong together."""
        path = epath.Path(folder) / SETTINGS_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = cls.from_sentencepiece(epath.Path(folder) / MODEL_FILE, settings["num_sentinels"])
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{folder} holds no saved vocabulary: {path} cannot be used ({error}).") from error
        check(
            vocabulary.fingerprint == settings.get("fingerprint"),
            f"{folder}: {MODEL_FILE} and {SETTINGS_FILE} do not belong together; copy both from the same run.",
        )
        return vocabulary


def _limited(documents: Iterable[str]) -> Iterator[str]:
    """Yields lines short enough for the trainer, until there is text enough."""
    characters = 0
    for document in documents:
        for start in range(0, len(document), _TRAINING_LINE):
            line = document[start : start + _TRAINING_LINE].replace("\n", " ").strip()
            if line:
                yield line
                characters += len(line)
        if characters > _TRAINING_CHARACTERS:
            return
