"""A vocabulary that a `tokenizer.json` describes in ways that SentencePiece has not, run by the library that wrote it.

Special tokens have T5's ids, or fairseq's, as in NLLB's tokenizers: there tokens such as `fra_Latn` name the language of a text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from flax_switch.config import ConfigError, check
from flax_switch.data.vocabulary import OtherTokenizerError, Vocabulary
from flax_switch.host.json_text import parse_json, valid_text

T = TypeVar("T")

_IDS = {"T5's": {"<pad>": 0, "</s>": 1, "<unk>": 2}, "fairseq's": {"<pad>": 1, "</s>": 2, "<unk>": 3}}
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
ENGLISH = "eng_Latn"  # what transformers takes for the language of a text where nobody says

LONGEST_PIECE = 4096  # characters; a piece of a million overflows the stack of the library, which ends the process


class ForeignVocabulary(Vocabulary):
    """Text to token ids and back as `tokenizers` has it; sentinels, if any, are at the top."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes) -> None:
        """Takes the contents of a `tokenizer.json`. Raises `ConfigError` where it cannot be used, or the extra is missing."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise OtherTokenizerError("it needs the package tokenizers: pip install 'flax_switch[tokenizers]'") from error
        _check_pieces(model)
        try:
            self._tokenizer: Any = Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the library raises plain exceptions
            raise ConfigError(f"tokenizer.json cannot be used: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.model, self.added = model, ()
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.num_sentinels = next(i for i in itertools.count() if self._tokenizer.token_to_id(f"<extra_id_{i}>") != size - 1 - i)
        self.num_pieces = size - self.num_sentinels
        found = {name: self._tokenizer.token_to_id(name) for name in _IDS["T5's"]}
        if found not in _IDS.values():
            needed = " or ".join(f"{whose} ({', '.join(f'{name} {i}' for name, i in ids.items())})" for whose, ids in _IDS.items())
            listed = ", ".join(f"{name} {i}" for name, i in found.items())
            raise OtherTokenizerError(f"it has the ids {listed}, but those needed are {needed}.")
        self.pad_id, self.eos_id, self.unk_id = found.values()
        if found == _IDS["fairseq's"]:
            tokens = self._tokenizer.get_added_tokens_decoder().items()
            self.languages = {token.content: i for i, token in tokens if _LANGUAGE.fullmatch(token.content)}

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without EOS."""
        return _run(self._tokenizer.encode, valid_text(text), add_special_tokens=False).ids

    def encode_source(self, text: str) -> list[int]:
        """Returns token ids of a text, its language's first: that which it begins with, such as `fra_Latn`, or else English."""
        ids = self.encode(text)
        if not self.languages or (ids and ids[0] in self.languages.values()):
            return ids
        check(ENGLISH in self.languages, f"The text does not say its language, and the tokenizer has no {ENGLISH}; name it.")
        return [self.languages[ENGLISH], *ids]

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of many texts, in parallel."""
        encoded = _run(self._tokenizer.encode_batch, [valid_text(text) for text in documents], add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; special tokens are left out or named."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _run(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls the library, which raises plain exceptions: for a character without a piece, where none is for unknown ones.

    Raises:
      ConfigError: in place of such.
    """
    try:
        return call(*args, **kwargs)
    except Exception as error:
        raise ConfigError(f"tokenizer.json does not serve for this text: {error}. Mend the file, or leave the text out.") from error


def _check_pieces(model: bytes) -> None:
    """Raises `ConfigError` for a vocabulary with a piece that is too long for the library."""
    found: Any = parse_json(model, "tokenizer.json")
    for name in ("model", "vocab"):
        found = found.get(name) if isinstance(found, dict) else None
    entries = found if isinstance(found, list | dict) else ()
    pieces = [entry[0] if isinstance(entry, list) and entry else entry for entry in entries]
    longest = max((len(piece) for piece in pieces if isinstance(piece, str)), default=0)
    check(
        longest <= LONGEST_PIECE,
        f"tokenizer.json has a piece of {longest:,} characters, where {LONGEST_PIECE:,} are the most; mend the file.",
    )
