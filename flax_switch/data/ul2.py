"""UL2's mixture of seven denoisers (2205.05131, table 1), each as often: span corruption with other noise, and the end as one span.

    R   15 % of the tokens in spans of 3 or 8
    S   the last 15 to 35 %, a quarter on average, as one span
    X   half of the tokens in spans of 3, 8 or 64, or 15 % in spans of 64

With `data.mode_tokens` the inputs begin with a token for R, S or X. Spans are drawn as T5 draws them, with lengths around the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

from flax_switch.config import DataConfig, check
from flax_switch.data.examples import Examples, Lengths, Objective
from flax_switch.data.random_bits import fold_in, uniform
from flax_switch.data.span_corruption import corrupted_lengths, noise_counts, span_corrupt

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture

R, S, X = range(3)
WHOLE = 2.0**40  # a mean span longer than any text: all noise is one span, the last
SUFFIX = (0.15, 0.35)  # of the text, the least and the most that S masks
DENOISERS = (  # (mode, share of noise, mean length of a span)
    (R, 0.15, 3.0), (R, 0.15, 8.0), (S, 0.25, WHOLE), (X, 0.5, 3.0), (X, 0.5, 8.0), (X, 0.15, 64.0), (X, 0.5, 64.0),
)  # fmt: skip
_MODE, _DENSITY, _LENGTH = (np.array(column) for column in zip(*DENOISERS, strict=True))
_MOST_NOISE = [(d, length) if mode != S else (SUFFIX[1], length) for mode, d, length in DENOISERS] + [(SUFFIX[0], WHOLE)]


def denoisers(keys: UInt64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
    """Draws a row of DENOISERS for every key."""
    return (uniform(fold_in(keys, 5)) * len(DENOISERS)).astype(np.int64)


def noise(keys: UInt64[np.ndarray, " M"]) -> tuple[Float64[np.ndarray, " M"], Float64[np.ndarray, " M"]]:
    """Draws the share of noise and the mean length of its spans for every key."""
    drawn, (least, most) = denoisers(keys), SUFFIX
    suffix = least + (most - least) * uniform(fold_in(keys, 6))
    return np.where(_MODE[drawn] == S, suffix, _DENSITY[drawn]), _LENGTH[drawn]


def most_room(lengths: Integer[np.ndarray, " M"]) -> Lengths:
    """Returns the longest inputs and targets that texts of these lengths become, whichever denoiser they get."""
    rooms = [corrupted_lengths(lengths, density, length) for density, length in _MOST_NOISE]
    inputs, targets = zip(*rooms, strict=True)
    return np.max(inputs, axis=0), np.max(targets, axis=0)


def _make(mixture: Mixture, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray, limits: Lengths) -> Examples:
    density, length = noise(keys)
    top, eos = mixture.top_sentinel, mixture.eos_id
    return span_corrupt(
        tokens, lengths, keys, top_sentinel=top, eos_id=eos, noise_density=density, mean_noise_span_length=length
    )  # fmt: skip


def _longest_text(config: DataConfig) -> int:
    lengths = np.arange(2, 3 + 2 * config.inputs_length)
    inputs, targets = most_room(lengths)
    fits = (inputs <= config.inputs_length) & (targets <= config.targets_length)
    check(
        bool(fits[0]),
        f"UL2's denoisers need data.inputs_length and data.targets_length of at least {inputs[0]} and {targets[0]}; they are "
        f"{config.inputs_length} and {config.targets_length}.",
    )
    return int(lengths[np.argmin(fits) - 1])  # the longest does not fit: its inputs are twice as long as they may be


def _most_spans(config: DataConfig, lengths: Integer[np.ndarray, " *M"]) -> Int64[np.ndarray, " *M"]:
    return np.max([noise_counts(lengths, density, length)[1] for _, density, length in DENOISERS], axis=0)


OBJECTIVE = Objective(
    make=_make,
    room=lambda mixture, lengths: most_room(lengths),
    longest_text=_longest_text,
    spans=_most_spans,
    mode=lambda keys: _MODE[denoisers(keys)],
    told="gaps of many lengths and rates, or the text goes on",
)
