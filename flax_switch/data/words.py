"""Words and the tokens they become: what tags are of, and where in a text a span begins and ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A word of a text, and where it stands there, in characters."""

    text: str
    start: int
    end: int


def words_of(text: str) -> list[Word]:
    """Returns what stands between the white space of a text."""
    return [Word(match[0], match.start(), match.end()) for match in re.finditer(r"\S+", text)]


def encode_words(words: Sequence[str], vocabulary: Any) -> list[list[int]]:
    """Returns the ids of each word; end to end they are those of the words with spaces between them."""
    alone = vocabulary.encode("a a") == vocabulary.encode("a") * 2  # not so where a space is a token by itself
    return [vocabulary.encode(word if alone or i == 0 else f" {word}") for i, word in enumerate(words)]


def question_text(question: str, context: str) -> str:
    """Returns the one text that a model for spans reads of a question and a context."""
    return f"question: {question} context: {context}"


class EncodedContext(NamedTuple):
    """A question and its context as ids without EOS, with the characters [start, end) of the context that each token stands for.

    Of the tokens of the question they are (-1, -1).
    """

    ids: list[int]
    characters: list[tuple[int, int]]

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """Returns the first and last token of the characters [start, end) of the context, both included; None where none are."""
        inside = [i for i, (a, b) in enumerate(self.characters) if a >= 0 and a < end and b > start]
        return (inside[0], inside[-1]) if inside else None


def encode_context(question: str, context: str, vocabulary: Any) -> EncodedContext:
    """Returns the ids of `question_text`, and what of the context they stand for."""
    before = words_of(question_text(question, ""))
    words = words_of(context)
    ids: list[int] = []
    characters: list[tuple[int, int]] = []
    encoded = encode_words([word.text for word in (*before, *words)], vocabulary)
    for i, tokens in enumerate(encoded):
        ids += tokens
        if i < len(before):
            characters += [(-1, -1)] * len(tokens)
        else:
            characters += _within(words[i - len(before)], tokens, vocabulary)
    return EncodedContext(ids, characters)


def _within(word: Word, tokens: Sequence[int], vocabulary: Any) -> list[tuple[int, int]]:
    """Returns the characters of each token of a word: its own where their texts join to the word, else those of the word."""
    ends = [len(vocabulary.decode(tokens[: i + 1]).strip()) for i in range(len(tokens))]
    plain = bool(tokens) and vocabulary.decode(tokens).strip() == word.text and ends == sorted(ends)
    if not plain:
        return [(word.start, word.end)] * len(tokens)
    return [(word.start + a, word.start + b) for a, b in zip((0, *ends), ends, strict=False)]
