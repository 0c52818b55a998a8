"""Tokens as text while they come: what is certain of it is told, and a stop sequence ends it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax_switch.config import SwitchConfig
from flax_switch.generation.text import texts_of

UNFINISHED = "\ufffd"  # what stands for the bytes of a character that lacks some


@dataclasses.dataclass
class Output:
    """The text of one sequence, told piece by piece: the pieces joined are the whole, whatever they are cut by."""

    vocabulary: Any
    config: SwitchConfig
    stop: tuple[str, ...] = ()
    told: str = ""
    tokens: Sequence[int] = ()  # that the text is of
    finish_reason: str | None = None

    def add(self, tokens: Sequence[int], finished: bool) -> str:
        """Takes all tokens so far, and returns the text that is new and will not change."""
        self.tokens, text = tokens, self._text(tokens)
        end = self._end(text)
        if end is not None:
            self.tokens = tokens[: self._count(tokens)]
            self.finish_reason, text = "stop", text[:end]
        elif finished:
            ends = {self.config.eos_token_id, *self.config.extra_eos_token_ids}
            self.finish_reason = "stop" if tokens and tokens[-1] in ends else "length"
        else:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
        if not text.startswith(self.told):
            return ""  # a tokenizer that thinks again, of which the next tokens will tell more
        new, self.told = text[len(self.told) :], text
        return new

    def offsets(self) -> list[int]:
        """Returns where the text of each token that is shown begins, and the end."""
        return [min(len(self._text(self.tokens[:i])), len(self.told)) for i in range(len(self.shown) + 1)]

    @property
    def shown(self) -> Sequence[int]:
        """The tokens without the one that ends them, which has no text."""
        ends = {self.config.eos_token_id, *self.config.extra_eos_token_ids}
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in ends else self.tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return texts_of([tokens], self.vocabulary, self.config)[0]

    def _end(self, text: str) -> int | None:
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)

    def _count(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens it takes to complete the stop sequence that comes first."""
        return next(i for i in range(1, len(tokens) + 1) if self._end(self._text(tokens[:i])) is not None)


def _overlap(text: str, stop: str) -> int:
    """Returns how much of the text's end may be the beginning of a stop sequence."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
