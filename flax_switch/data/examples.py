"""A few examples of inputs and targets as padded arrays: what objectives make and batches are put together from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

OBJECTIVES = ("span_corruption", "prefix_lm", "infilling")


class Examples(NamedTuple):
    """M examples; what lies past a length is 0. EOS is part of inputs and targets."""

    inputs: Int32[np.ndarray, "M I"]
    input_lengths: Int64[np.ndarray, " M"]
    targets: Int32[np.ndarray, "M T"]
    target_lengths: Int64[np.ndarray, " M"]
    objective: Int8[np.ndarray, " M"] | None = None  # an index into OBJECTIVES; None where there is one alone, or none of them
    hidden: Bool[np.ndarray, "M T"] | None = None  # targets whose text is not in the inputs; None: all of them


def span_of_each(lengths: Int64[np.ndarray, " M"]) -> tuple[Int64[np.ndarray, " total"], Int64[np.ndarray, " total"]]:
    """Returns (row, offset in the row) of every element of ragged rows laid end to end."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    return rows, np.arange(len(rows)) - (ends - lengths)[rows]
