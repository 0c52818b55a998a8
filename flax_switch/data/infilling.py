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
from jaxtyping import Bool, Int32, Int64, Integer, UInt64

from flax_switch.config import DataConfig, check
from flax_switch.data.examples import Examples, Lengths, Objective
from flax_switch.data.prefix_lm import cut
from flax_switch.data.random_bits import fold_in, uniform
from flax_switch.data.span_corruption import (
    corrupted_lengths,
    derived_raw_length,
    random_spans_noise_mask,
    settings_of,
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
    word_starts: Bool[np.ndarray, " V"] | None = None,
    words: float = 1.0,
) -> Examples:
    """Masks spans of M texts; `hidden` marks the targets that the inputs do not show, EOS not among them.

    `top_sentinel` is `<extra_id_0>`'s id; the next span's is one less. With `word_starts`, which ids begin a word, spans of a
    share of `words` of the texts are widened to whole words, but for texts that would show nothing then.
    """
    lengths = np.asarray(lengths, np.int64)
    mask = random_spans_noise_mask(
        lengths, keys, noise_density=noise_density, mean_noise_span_length=mean_noise_span_length, shifted=True
    )
    tokens = tokens[:, : mask.shape[1]]
    if word_starts is not None:
        widened = uniform(fold_in(keys, 7)) < words
        mask = np.where(widened[:, None], whole_words(mask, word_starts[tokens], lengths), mask)
    targets = cut(tokens, np.zeros_like(lengths), lengths, eos_id)
    hidden = np.zeros(targets.shape, bool)
    hidden[:, : mask.shape[1]] = mask
    return Examples(*masked_inputs(tokens, lengths, mask, top_sentinel, eos_id), targets, lengths + 1, hidden=hidden)


def whole_words(
    mask: Bool[np.ndarray, "M L"], starts: Bool[np.ndarray, "M L"], lengths: Integer[np.ndarray, " M"]
) -> Bool[np.ndarray, "M L"]:
    """Returns a mask of all words that the mask touches; of texts all of whose words it touches, the mask itself."""
    text = np.arange(mask.shape[1]) < lengths[:, None]
    word = np.cumsum(starts, axis=1)
    touched = np.zeros((len(mask), mask.shape[1] + 1), bool)
    row, column = np.nonzero(mask)
    touched[row, word[row, column]] = True
    wide = np.take_along_axis(touched, word, axis=1) & text
    return np.where((wide == text).all(axis=1, keepdims=True), mask, wide)


def masked_inputs(
    tokens: Integer[np.ndarray, "M L"],
    lengths: Integer[np.ndarray, " M"],
    mask: Bool[np.ndarray, "M L"],
    top_sentinel: int,
    eos_id: int,
) -> tuple[Int32[np.ndarray, "M I"], Int64[np.ndarray, " M"]]:
    """Returns texts with a sentinel for each run of masked tokens and EOS at their end, and their lengths."""
    begins = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    shown = (~mask & (np.arange(mask.shape[1]) < lengths[:, None])) | begins
    input_lengths = shown.sum(axis=1) + 1
    inputs = np.zeros((len(mask), int(input_lengths.max(initial=0))), np.int32)
    row, column = np.nonzero(shown)
    sentinels = top_sentinel - np.cumsum(begins, axis=1) + 1
    inputs[row, np.cumsum(shown, axis=1)[row, column] - 1] = np.where(begins, sentinels, tokens)[row, column]
    inputs[np.arange(len(mask)), input_lengths - 1] = eos_id
    return inputs, input_lengths


def _longest_text(config: DataConfig) -> int:
    check(config.targets_length >= 3, f"Infilling needs data.targets_length of at least 3; it is {config.targets_length}.")
    noise = (config.noise_density, config.mean_noise_span_length)
    return min(derived_raw_length(config.inputs_length, None, *noise)[0], config.targets_length - 1)


def _room(mixture: Mixture, lengths: np.ndarray) -> Lengths:
    inputs, targets = corrupted_lengths(lengths, mixture.config.noise_density, mixture.config.mean_noise_span_length)
    return inputs, np.maximum(targets, lengths + 1)


def _make(mixture: Mixture, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray, limits: Lengths) -> Examples:
    words = mixture.config.infilling_words
    return infill(tokens, lengths, keys, **settings_of(mixture), word_starts=mixture.word_starts, words=words)


OBJECTIVE = Objective(
    make=_make,
    room=_room,
    longest_text=_longest_text,
    spans=spans_of_settings,
    told="the whole text comes back, its gaps filled in",
)
