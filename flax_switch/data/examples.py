"""A few examples of inputs and targets as padded arrays: what objectives make and batches are put together from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from flax_switch.config import DataConfig

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture

MODES = 3  # UL2's: R (0: few and short spans are masked), S (1: the end), X (2: much, or long spans)


class Examples(NamedTuple):
    """M examples; what lies past a length is 0. EOS is part of inputs and targets."""

    inputs: Int32[np.ndarray, "M I"]
    input_lengths: Int64[np.ndarray, " M"]
    targets: Int32[np.ndarray, "M T"]
    target_lengths: Int64[np.ndarray, " M"]
    objective: Int8[np.ndarray, " M"] | None = None  # a row of OBJECTIVES; None where there is one alone, or none of them
    hidden: Bool[np.ndarray, "M T"] | None = None  # targets whose text is not in the inputs; None: all of them


class Example(NamedTuple):
    """An example of a task as text: the inputs with their prefix, and one or more targets, of which the first is learnt."""

    inputs: str
    references: tuple[str, ...]
    context: str = ""  # in which the references stand, where they are spans


Lengths = tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]  # of inputs and targets, EOS included


class Objective(NamedTuple):
    """What makes examples of texts: a row of `objectives.OBJECTIVES`."""

    # (mixture, tokens [M, L], lengths [M], keys [M], the most that inputs and targets may hold) -> examples
    make: Callable[[Mixture, np.ndarray, np.ndarray, np.ndarray, Lengths], Examples]
    room: Callable[[Mixture, np.ndarray], Lengths]  # lengths of the inputs and targets that texts of these lengths become
    longest_text: Callable[[DataConfig], int]  # the most tokens that fit data.inputs_length and data.targets_length
    told: str  # what it asks of a model, in a few words
    # (config, lengths [M]) -> how many spans of each text are masked by sentinels; None: none
    spans: Callable[[DataConfig, np.ndarray], np.ndarray] | None = None
    fits_any_room: bool = False  # whether it makes do with the room that other objectives of a mixture need
    # keys [M] -> which of the last sentinels, counted from the end, inputs begin with under data.mode_tokens; None: with none
    mode: Callable[[np.ndarray], np.ndarray] | None = None


def span_of_each(lengths: Int64[np.ndarray, " M"]) -> tuple[Int64[np.ndarray, " total"], Int64[np.ndarray, " total"]]:
    """Returns (row, offset in the row) of every element of ragged rows laid end to end."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    return rows, np.arange(len(rows)) - (ends - lengths)[rows]
