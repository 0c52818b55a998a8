"""Causal language modelling: no inputs, and all of a text as targets. For a decoder alone, whose start token it follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flax_switch.data.examples import Examples, Lengths, Objective
from flax_switch.data.prefix_lm import cut

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture


def _make(mixture: Mixture, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray, limits: Lengths) -> Examples:
    most = np.minimum(lengths, limits[0] + limits[1] - 1)
    none = np.zeros_like(most)
    return Examples(np.zeros((len(most), 0), np.int32), none, cut(tokens, none, most, mixture.eos_id), most + 1)


OBJECTIVE = Objective(
    make=_make,
    room=lambda mixture, lengths: (np.zeros_like(lengths), lengths + 1),
    longest_text=lambda config: config.inputs_length + config.targets_length - 1,
    fits_any_room=True,
    told="a whole text, from its beginning",
)
