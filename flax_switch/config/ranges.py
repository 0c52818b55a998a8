"""Ranges of numbers in settings. Each stands in its field's annotation, `steps: Count`, and is checked with the field's type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

LARGEST_INTEGER = 2**31 - 1  # what an index in XLA holds
LARGEST_FLOAT = 3.4e38  # what float32 holds


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included; `above` and `below` are ends that are not. NaN and infinities are in none."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    largest: float | None = None  # what no use needs more of; by default what a 32-bit integer or float holds
    also: tuple[float, ...] = ()  # single numbers outside
    off: str = ""  # what to write to turn the thing off, as a sentence: it ends the message

    def limit(self, number: Any) -> float:
        """Returns the size beyond which such a number is refused."""
        return self.largest or (LARGEST_INTEGER if isinstance(number, int) else LARGEST_FLOAT)

    def __contains__(self, number: Any) -> bool:
        """Returns whether the number is in the range."""
        return number in self.also or (
            abs(number) <= (self.limit(number) if self.most is None else LARGEST_FLOAT)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Returns what a number must be or do, after 'must'."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            text = f"lie in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        elif low == 0:
            text = "not be negative" if self.above is None else "be positive"
        else:
            text = "be finite" if low is None else f"be {'at least' if self.above is None else 'above'} {low}"
        return " or be ".join([text, *map(str, self.also)])


def refusal(name: str, number: Any, allowed: Range) -> str:
    """Returns the sentence that refuses a number, or nothing where it is in the range."""
    if number in allowed:
        return ""
    bounded = allowed.most is not None or allowed.below is not None
    size = f" and at most {allowed.limit(number)}" if number > allowed.limit(number) and not bounded else ""
    return f"{name} must {allowed}{size}; it is {shown(number, str)}." + (f" {allowed.off}" if allowed.off else "")


def shown(value: Any, as_text: Callable[[Any], str] = repr) -> str:
    """Returns a value as messages show it: not more than the beginning of a long one."""
    try:
        text = as_text(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}..."


Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]  # 0 too
Every = Annotated[int, Range(least=1, off="To have it at the end alone, set it to train.steps.")]  # steps
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Layers = Annotated[int, Range(least=0, largest=10_000)]  # they are built one by one
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Rate = Annotated[float, Range(least=0, below=1, off="0 turns it off.")]
Share = Annotated[float, Range(above=0, below=1)]
Epsilon = Annotated[float, Range(least=1e-30)]  # added to what may be zero and is divided by
