"""What counts as a word in ROUGE and BLEU: by the script that references are written in, or as a setting says."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from flax_switch.config.finetuning import SCORE_TOKENIZERS

log = logging.getLogger(__name__)

# Scripts that put no blanks between words, by the beginning of their characters' names.
_WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE")
_BLEU = {"latin": "13a", "unicode": "intl", "characters": "char"}  # sacreBLEU's names


def resolve(tokenizer: str, references: Iterable[Sequence[str]]) -> str:
    """Returns what "auto" means for references: by what most of their letters are."""
    if tokenizer != "auto":
        return tokenizer
    counts = dict.fromkeys(SCORE_TOKENIZERS[1:], 0)
    for letter in (c for texts in references for text in texts for c in text if c.isalpha()):
        name = unicodedata.name(letter, "")
        kind = "latin" if name.startswith("LATIN") else "characters" if name.startswith(_WITHOUT_BLANKS) else "unicode"
        counts[kind] += 1
    return max(counts, key=lambda kind: counts[kind])


def bleu_tokenizer(tokenizer: str) -> str:
    """Returns sacreBLEU's name of a tokenizer."""
    return _BLEU[tokenizer]


class RougeWords:
    """Cuts texts for rouge-score: into words of letters, their marks and digits of any script, or into single characters."""

    def __init__(self, tokenizer: str) -> None:
        self.characters = tokenizer == "characters"

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text in lower case."""
        words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower()).split()
        return [c for word in words for c in word] if self.characters else words


def warn_of_empty(words: Iterable[tuple[str, Sequence[str]]], metric: str, tokenizer: str) -> None:
    """Says in the log how many references have no word, and so can be matched by nothing."""
    empty = [text for text, found in words if not found]
    if empty:
        log.warning(
            "%s: %d references have no word under evaluation.tokenizer=%r, such as %r; they score 0 whatever is predicted.",
            metric, len(empty), tokenizer, empty[0][:80],
        )  # fmt: skip
