"""What a server takes on: the most of everything."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from flax_switch.config.base import _Section
from flax_switch.config.ranges import Range

SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Limits(_Section):
    """Limits of one server. Lengths are in tokens, times in seconds; raises `ConfigError` for what cannot be."""

    slots: Annotated[int, Range(1, 1024)] = 16  # sequences that decode at the same time, for each length of sources
    max_source_length: Annotated[int, Range(1, 2**16)] = 512  # EOS included; longer prompts are refused
    max_tokens: Annotated[int, Range(1, 2**16)] = 256  # of an output; it is also what each slot has room for
    queue: Annotated[int, Range(0, 2**20)] = 256  # sequences that wait for a slot; more are refused
    max_body: Annotated[int, Range(1024, 2**30)] = 2**20  # bytes of a request
    timeout: Annotated[float, Range(0.1, 86400)] = 120.0  # from a request's arrival to its end

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that sources are filled up to: four times the one before, up to the longest."""
        found, length = [], SMALLEST_BUCKET
        while length < self.max_source_length:
            found.append(length)
            length *= 4
        return (*found, self.max_source_length)

    def bucket(self, length: int) -> int:
        """Returns the bucket of a source."""
        return next(bucket for bucket in self.buckets if bucket >= length)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many slots a step may compute, so that few sequences cost little: one, and every quarter of all."""
        return tuple(sorted({1, *(-(-self.slots * quarter // 4) for quarter in range(1, 5))}))

    @property
    def batches(self) -> tuple[int, ...]:
        """How many sources are encoded together."""
        return tuple(sorted({1, *(min(batch, self.slots) for batch in (4, 8, 16))}))
