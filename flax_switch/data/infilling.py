"""Text infilling (BART, 1910.13461, section 2.2) with T5's sentinels: spans are masked, and the targets are the whole text.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets  Thank you for inviting me to your party last week </s>

Most targets can be copied from the inputs, and only through the encoder: a model trained on them needs its encoder. Spans are
as many and as long as in span corruption, but a text may begin with a span and end without one, as a line with a gap does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer, UInt64

from flax_switch.config import DataConfig, check
from flax_switch.data.examples import Examples, Lengths, Objective
from flax_switch.data.prefix_lm import cut
from flax_switch.data.span_corruption import (
    corrupted_lengths,
    derived_raw_length,
    random_spans_noise_mask,
    settings_of,
    span_corrupt,
    spans_of_settings,
)

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture


def infill(
    tokens: Integer[np.ndarray, "M L"],
    lengths: Integer[np.ndarray, " M"],
    keys: UInt64[np.ndarray, " M"],
    *,
    top_sentinel: int,
    eos_id: int = 1,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> Examples:
    """Masks spans of M texts; `hidden` marks the targets that the inputs do not show, EOS not among them.

    `top_sentinel` is `<extra_id_0>`'s id; the next span's is one less.
    """
    lengths = np.asarray(lengths, np.int64)
    noise = dict(noise_density=noise_density, mean_noise_span_length=mean_noise_span_length, shifted=True)
    corrupted = span_corrupt(tokens, lengths, keys, top_sentinel=top_sentinel, eos_id=eos_id, **noise)
    targets = cut(tokens, np.zeros_like(lengths), lengths, eos_id)
    hidden = np.zeros(targets.shape, bool)
    mask = random_spans_noise_mask(lengths, keys, **noise)
    hidden[:, : mask.shape[1]] = mask
    return Examples(corrupted.inputs, corrupted.input_lengths, targets, lengths + 1, hidden=hidden)


def _longest_text(config: DataConfig) -> int:
    check(config.targets_length >= 3, f"Infilling needs data.targets_length of at least 3; it is {config.targets_length}.")
    noise = (config.noise_density, config.mean_noise_span_length)
    return min(derived_raw_length(config.inputs_length, None, *noise)[0], config.targets_length - 1)


def _room(mixture: Mixture, lengths: np.ndarray) -> Lengths:
    inputs, targets = corrupted_lengths(lengths, mixture.config.noise_density, mixture.config.mean_noise_span_length)
    return inputs, np.maximum(targets, lengths + 1)


OBJECTIVE = Objective(
    make=lambda mixture, tokens, lengths, keys, limits: infill(tokens, lengths, keys, **settings_of(mixture)),
    room=_room,
    longest_text=_longest_text,
    spans=spans_of_settings,
)
