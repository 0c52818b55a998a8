"""ByT5's vocabulary: the bytes of UTF-8 are its tokens (2105.13626, section 3.1): it needs no model, and no text is unknown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from flax_switch.config import check
from flax_switch.config.ranges import shown
from flax_switch.data.vocabulary import MOST_SENTINELS, Vocabulary
from flax_switch.host.json_text import field, json_object, valid_text

CONFIG_FILE = "tokenizer_config.json"
BYTES, OFFSET = 256, 3  # byte b has the id b + 3, behind pad, EOS and unk
_SPECIAL = re.compile(r"\s*(?P<control><pad>|</s>|<unk>)\s*|<extra_id_(?P<sentinel>0|[1-9][0-9]{0,5})>")
_CONTROLS = ("<pad>", "</s>", "<unk>")


class ByteVocabulary(Vocabulary):
    """Text to token ids and back as transformers' ByT5Tokenizer has it: pad 0, EOS 1, unk 2, bytes, sentinels counting up."""

    file_name = CONFIG_FILE

    def __init__(self, model: bytes) -> None:
        """Takes the contents of a `tokenizer_config.json` that names ByT5Tokenizer: it says how many sentinels (125)."""
        values = json_object(model, CONFIG_FILE)
        self.model, self.added, self.num_pieces = model, (), BYTES + OFFSET
        names = ("extra_special_tokens", "additional_special_tokens")
        named = [found for name in names if (found := field(values, name, (list, dict, type(None)), CONFIG_FILE, None))]
        texts = [str(token.get("content") if isinstance(token, dict) else token) for token in (named[0] if named else [])]
        sentinels = [text for text in texts if re.fullmatch(r"<extra_id_\d+>", text)]
        self.num_sentinels = len(sentinels) if named else field(values, "extra_ids", int, CONFIG_FILE, 125)
        check(
            len(sentinels) == len(texts) and 0 <= self.num_sentinels <= MOST_SENTINELS,
            f"{CONFIG_FILE}: sentinels, <extra_id_0> and on, at most {MOST_SENTINELS} of them, are the only extra tokens of ByT5 "
            f"that are read; they are {shown(texts or self.num_sentinels)}.",
        )

    @classmethod
    def with_sentinels(cls, num_sentinels: int = 125) -> ByteVocabulary:
        """Returns the vocabulary with so many sentinels."""
        values = dict(
            tokenizer_class="ByT5Tokenizer", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=num_sentinels
        )
        return cls((json.dumps(values, indent=2) + "\n").encode())

    def sentinel_id(self, i: int) -> int:
        """Returns the id of `<extra_id_i>`: 259 for 0, one more for each next."""
        check(0 <= i < self.num_sentinels, f"There are {self.num_sentinels} sentinels; <extra_id_{i}> is not one of them.")
        return self.num_pieces + i

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without EOS; blanks around `<pad>`, `</s>` and `<unk>` go with them, as there."""
        text = valid_text(text)
        ids, end = [], 0
        for match in _SPECIAL.finditer(text):
            control, number = match["control"], match["sentinel"]
            if control is None and int(number) >= self.num_sentinels:
                continue
            ids += self._bytes(text[end : match.start()])
            ids.append(self.sentinel_id(int(number)) if control is None else _CONTROLS.index(control))
            end = match.end()
        return ids + self._bytes(text[end:])

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of many texts. Sentinels in them are plain characters: corpus text has none."""
        return [self._bytes(valid_text(text)) for text in documents]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are no characters of UTF-8 are left out, special tokens left out or named."""
        content = b""
        for i in map(int, ids):
            if OFFSET <= i < self.num_pieces:
                content += bytes([i - OFFSET])
            elif not skip_special_tokens:
                content += self._special_name(i).encode()
        return content.decode("utf-8", "ignore")

    def _bytes(self, text: str) -> list[int]:
        return [byte + OFFSET for byte in text.encode()]

    def _special_name(self, i: int) -> str:
        if 0 <= i < OFFSET:
            return _CONTROLS[i]
        return f"<extra_id_{i - self.num_pieces}>" if self.num_pieces <= i < self.size else "<unk>"

    def __repr__(self) -> str:
        return f"{BYTES} bytes and {self.num_sentinels} sentinels"
