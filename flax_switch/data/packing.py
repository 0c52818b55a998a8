"""Which short examples share a row, so that rows are full: first fit, over a window of open rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from flax_switch.config import check

_OPEN_ROWS = 64


class Plan(NamedTuple):
    """Row r holds the examples `order[offsets[r] : offsets[r + 1]]`."""

    order: Int64[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " R+1"]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1


def plan_rows(
    input_lengths: Integer[np.ndarray, " N"],
    target_lengths: Integer[np.ndarray, " N"],
    inputs_length: int,
    targets_length: int,
    seed: int = 0,
    joined: bool = False,
) -> Plan:
    """Puts every example, in an order shuffled by `seed`, into the first open row that has room for it.

    joined: inputs and targets share the room of both, as one sequence. Raises `ConfigError` where an example is longer than a row.
    """
    if joined:
        input_lengths = target_lengths = input_lengths + target_lengths
        inputs_length = targets_length = inputs_length + targets_length
    lengths = np.stack([input_lengths, target_lengths], axis=1).astype(np.int64)
    room = np.array([inputs_length, targets_length])
    check(
        bool((lengths <= room).all()),
        f"An example of {lengths.max(axis=0, initial=0).tolist()} tokens (inputs, targets) does not fit rows of {room.tolist()}.",
    )
    order = np.random.default_rng(seed).permutation(len(lengths))
    free = np.tile(room, (_OPEN_ROWS, 1))  # of the open rows
    open_rows = np.arange(_OPEN_ROWS)  # their numbers
    row_of = np.zeros(len(lengths), np.int64)
    rows = _OPEN_ROWS
    for example in order:
        fits = np.flatnonzero((free >= lengths[example]).all(axis=1))
        if len(fits):
            place = fits[0]
        else:  # the fullest row is closed and a new one opened in its place
            place = int(free.min(axis=1).argmin())
            free[place], open_rows[place] = room, rows
            rows += 1
        free[place] -= lengths[example]
        row_of[example] = open_rows[place]
    _, dense = np.unique(row_of, return_inverse=True)  # without the rows that stayed empty
    by_row = order[np.argsort(dense[order], kind="stable")]
    return Plan(by_row, np.concatenate([[0], np.cumsum(np.bincount(dense))]) if len(order) else np.zeros(1, np.int64))
