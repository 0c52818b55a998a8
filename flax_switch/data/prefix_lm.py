"""Prefix language modelling (1910.10683, section 3.2.1): the inputs are a beginning of the text, the targets go on from there.

The split point is uniform among those that leave the targets as full as they can be, so that nearly every target position
trains: with n tokens and room for T in the targets, the inputs are a prefix of 1 to max(1, n - T) tokens that fits them, and
the targets are the tokens after it. Both end with EOS, as in span corruption; inputs without sentinels tell the model which
task it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer, UInt64

from flax_switch.data.examples import Examples, Lengths, Objective
from flax_switch.data.random_bits import fold_in, uniform

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture


def prefix_lm(
    tokens: Integer[np.ndarray, "M L"],
    lengths: Integer[np.ndarray, " M"],
    keys: UInt64[np.ndarray, " M"],
    *,
    inputs_length: int | Integer[np.ndarray, " M"],
    targets_length: int | Integer[np.ndarray, " M"],
    eos_id: int = 1,
) -> Examples:
    """Splits M texts at random points. `inputs_length` and `targets_length` (for each example or all) include EOS."""
    lengths = np.asarray(lengths, np.int64)
    longest_prefix = np.minimum(np.maximum(lengths - (np.asarray(targets_length) - 1), 1), np.asarray(inputs_length) - 1)
    longest_prefix = np.minimum(longest_prefix, lengths)
    prefix = np.minimum(1 + (uniform(fold_in(keys, 3)) * longest_prefix).astype(np.int64), longest_prefix)
    rest = np.minimum(lengths - prefix, np.asarray(targets_length) - 1)
    return Examples(cut(tokens, np.zeros_like(prefix), prefix, eos_id), prefix + 1, cut(tokens, prefix, rest, eos_id), rest + 1)


def cut(tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, eos_id: int) -> np.ndarray:
    """Takes `counts[m]` tokens of each row from `starts[m]` on, then EOS, then 0."""
    columns = np.arange(int(counts.max(initial=0)) + 1)
    source = np.minimum(starts[:, None] + columns, tokens.shape[1] - 1)
    taken = np.take_along_axis(tokens, source, axis=1)
    ended = np.where(columns == counts[:, None], eos_id, 0)
    return np.where(columns < counts[:, None], taken, ended).astype(np.int32)


def _make(mixture: Mixture, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray, limits: Lengths) -> Examples:
    inputs_limit, targets_limit = limits
    return prefix_lm(tokens, lengths, keys, inputs_length=inputs_limit, targets_length=targets_limit, eos_id=mixture.eos_id)


def _room(mixture: Mixture, lengths: np.ndarray) -> Lengths:
    targets = np.minimum(lengths // 2 + 1, mixture.config.targets_length)
    return np.minimum(lengths - targets + 2, mixture.config.inputs_length), targets


OBJECTIVE = Objective(
    make=_make,
    room=_room,
    longest_text=lambda config: config.inputs_length + config.targets_length - 2,
    mode=np.ones_like,  # S
    fits_any_room=True,
    told="the text goes on",
)
