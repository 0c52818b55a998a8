"""T5's span corruption (1910.10683, section 3.1.4): random spans are replaced by sentinels, and the targets spell them out.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets  <extra_id_0> for inviting <extra_id_1> last </s>

The numbers of noise tokens and spans follow from an example's length; where the spans lie is random: noise and non-noise tokens
are each cut into as many non-empty segments, all such cuts being equally likely, and the segments alternate, non-noise first.
All functions work on M examples at once, with a 64-bit key each (`flax_switch.data.random_bits`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, Integer, UInt64

from flax_switch.config import ConfigError, DataConfig, check
from flax_switch.data.examples import Examples, Objective, span_of_each
from flax_switch.data.random_bits import fold_in, random_words, uniform

if TYPE_CHECKING:
    from flax_switch.data.objectives import Mixture

PerText = float | Float[np.ndarray, " *M"]  # a setting of all M texts, or of each


def noise_counts(
    lengths: Integer[np.ndarray, " *M"], noise_density: PerText = 0.15, mean_noise_span_length: PerText = 3.0
) -> tuple[Int64[np.ndarray, " *M"], Int64[np.ndarray, " *M"]]:
    """Returns how many tokens of examples of these lengths are noise, and in how many spans.

    Of two or more tokens at least one is noise and at least one is not; of fewer, none is.
    """
    lengths = np.asarray(lengths, np.int64)
    # The product in float32, as T5 has it: 190 tokens make 28.500001 there, so 29, where float64 would round 28.5 to 28.
    wanted = np.round(lengths.astype(np.float32) * np.asarray(noise_density, np.float32)).astype(np.int64)
    noise = np.clip(wanted, 1, np.maximum(lengths - 1, 1))
    shorter = np.minimum(noise, lengths - noise)  # every span needs a token of each kind
    spans = np.clip(np.round(noise / mean_noise_span_length).astype(np.int64), 1, np.maximum(shorter, 1))
    long_enough = lengths >= 2
    return np.where(long_enough, noise, 0), np.where(long_enough, spans, 0)


def corrupted_lengths(
    lengths: Integer[np.ndarray, " *M"], noise_density: PerText = 0.15, mean_noise_span_length: PerText = 3.0
) -> tuple[Int64[np.ndarray, " *M"], Int64[np.ndarray, " *M"]]:
    """Returns lengths of inputs and targets, sentinels and EOS included, that examples of these lengths become."""
    noise, spans = noise_counts(lengths, noise_density, mean_noise_span_length)
    return lengths - noise + spans + 1, noise + spans + 1


def derived_raw_length(
    inputs_length: int,
    targets_length: int | None = None,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    num_sentinels: int | None = None,
) -> tuple[int, int]:
    """Returns (the most tokens whose corruption fits the inputs and, where given, the targets; the targets' length it then needs).

    568 and 114 for inputs of 512. Raises `ConfigError` where not even two tokens fit or the sentinels would not suffice.
    """
    lengths = np.arange(2, 2 + int(inputs_length / (1 - noise_density)) + 8)
    inputs, targets = corrupted_lengths(lengths, noise_density, mean_noise_span_length)
    fits = (inputs <= inputs_length) & (targets <= (targets_length or np.iinfo(np.int64).max))
    if not fits[0]:
        raise ConfigError(
            f"Span corruption needs inputs_length and targets_length of at least 3; they are {inputs_length} and {targets_length}."
        )
    last = int(np.argmin(fits)) - 1 if not fits.all() else len(fits) - 1
    if num_sentinels is not None:
        spans = int(noise_counts(lengths[last], noise_density, mean_noise_span_length)[1])
        check_sentinels(int(lengths[last]), spans, num_sentinels)
    return int(lengths[last]), int(targets[last])


def check_sentinels(length: int, spans: int, num_sentinels: int) -> None:
    """Raises `ConfigError` where a text of this length has more masked spans than there are sentinels for them."""
    check(
        spans <= num_sentinels,
        f"Masking {length} tokens needs {spans} sentinels, but the vocabulary has {num_sentinels} for that. Raise "
        "data.num_sentinels or data.mean_noise_span_length, or lower data.inputs_length.",
    )


def _random_segments(
    sizes: Int64[np.ndarray, " M"], segments: Int64[np.ndarray, " M"], keys: UInt64[np.ndarray, " M"]
) -> Bool[np.ndarray, "M size"]:
    """Returns where segments begin when `sizes[m]` items are cut at random into `segments[m]` non-empty ones.

    Every row with a segment begins one at item 0; its other beginnings are a random subset of the items after it.
    """
    width = int(sizes.max(initial=0))
    columns = np.arange(width, dtype=np.uint64)
    # The column in the lowest bits makes words distinct, so that exactly the wanted number lies below a threshold.
    bits = np.uint64(max(width - 1, 1).bit_length())
    words = (random_words(keys, width) >> bits << bits) | columns
    begins = np.zeros((len(sizes), width), bool)
    if width:
        never = np.uint64(2**64 - 1)
        words[:, 0] = never
        words[columns >= sizes[:, None].astype(np.uint64)] = never
        threshold = np.take_along_axis(np.sort(words, axis=1), np.maximum(segments - 2, 0)[:, None], axis=1)
        begins = (words <= threshold) & (segments >= 2)[:, None]
        begins[:, 0] = segments >= 1
    return begins


class _Spans:
    """Where the noise spans of M examples lie. A, B: the examples' non-noise and noise tokens, in order; S: all spans."""

    def __init__(
        self, lengths: Int64[np.ndarray, " M"], keys: UInt64[np.ndarray, " M"], noise_density: PerText, mean_span_length: PerText,
        shifted: bool = False,
    ):  # fmt: skip
        self.noise, self.spans = noise_counts(lengths, noise_density, mean_span_length)
        self.kept = lengths - self.noise
        kept_begins = _random_segments(self.kept, self.spans, fold_in(keys, 1))
        noise_begins = _random_segments(self.noise, self.spans, fold_in(keys, 2))
        self.row, kept_start = np.nonzero(kept_begins)  # [S] by row, then by span
        _, self.noise_start = np.nonzero(noise_begins)  # [S] where in the row's noise each span begins
        _, self.index = span_of_each(self.spans)  # [S] number of the span within its row
        self.first = np.cumsum(self.spans) - self.spans  # [M] each row's first span, as an index into S
        last = self.index == self.spans[self.row] - 1
        # A noise span comes after as many kept tokens as the next kept segment's beginning.
        self.kept_before = np.where(last, self.kept[self.row], np.append(kept_start[1:], 0))
        if shifted:
            before = self.kept_before[self.first[self.row]]  # [S] kept tokens before the row's first span
            self.kept_before = self.kept_before - ((before + 1) * uniform(fold_in(keys, 4))[self.row]).astype(np.int64)
        passed = np.zeros((len(lengths), kept_begins.shape[1] + 1), np.int64)
        passed[self.row, self.kept_before] = 1
        self.spans_before = np.cumsum(passed, axis=1)  # [M A] spans before each kept token
        self.noise_span = np.cumsum(noise_begins, axis=1) - 1  # [M B]

    def noise_before(self, row: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Returns how many noise tokens the first so many spans of the given rows have."""
        inner = spans < self.spans[row]
        return np.where(inner, np.append(self.noise_start, 0)[np.where(inner, self.first[row] + spans, -1)], self.noise[row])


def random_spans_noise_mask(
    lengths: Integer[np.ndarray, " M"],
    keys: UInt64[np.ndarray, " M"],
    *,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    shifted: bool = False,
) -> Bool[np.ndarray, "M L"]:
    """Returns which tokens are noise; False past a row's length.

    Rows begin with non-noise and end with noise, as T5's do. With `shifted`, a random part of the non-noise at the beginning (none
    to all of it) is at the end instead.
    """
    lengths = np.asarray(lengths, np.int64)
    spans = _Spans(lengths, keys, noise_density, mean_noise_span_length, shifted)
    mask = np.zeros((len(lengths), int(lengths.max(initial=0))), bool)
    row, token = span_of_each(spans.noise)
    mask[row, token + spans.kept_before[spans.first[row] + spans.noise_span[row, token]]] = True
    return mask


def span_corrupt(
    tokens: Integer[np.ndarray, "M L"],
    lengths: Integer[np.ndarray, " M"],
    keys: UInt64[np.ndarray, " M"],
    *,
    top_sentinel: int,
    eos_id: int = 1,
    noise_density: PerText = 0.15,
    mean_noise_span_length: PerText = 3.0,
    shifted: bool = False,
) -> Examples:
    """Returns inputs with sentinels for the noise spans, and targets that spell the spans out; both end with EOS.

    The spans are those of `random_spans_noise_mask`. `top_sentinel` is `<extra_id_0>`'s id; the next span's is one less. Widths are
    those of the longest example, as `corrupted_lengths` gives them.
    """
    lengths = np.asarray(lengths, np.int64)
    spans = _Spans(lengths, keys, noise_density, mean_noise_span_length, shifted)
    input_lengths, target_lengths = spans.kept + spans.spans + 1, spans.noise + spans.spans + 1
    inputs = np.zeros((len(lengths), int(input_lengths.max(initial=0))), np.int32)
    targets = np.zeros((len(lengths), int(target_lengths.max(initial=0))), np.int32)

    # Before a kept token stand, in the inputs, the sentinels of the spans before it, and in the text these spans' noise.
    row, token = span_of_each(spans.kept)
    before = spans.spans_before[row, token]
    inputs[row, token + before] = tokens[row, token + spans.noise_before(row, before)]
    # Before a noise token of span k stand k + 1 sentinels in the targets, and k + 1 segments of kept tokens in the text.
    row, token = span_of_each(spans.noise)
    span = spans.noise_span[row, token]
    targets[row, token + span + 1] = tokens[row, token + spans.kept_before[spans.first[row] + span]]

    sentinels = top_sentinel - spans.index
    inputs[spans.row, spans.kept_before + spans.index] = sentinels
    targets[spans.row, spans.noise_start + spans.index] = sentinels
    every = np.arange(len(lengths))
    inputs[every, input_lengths - 1] = eos_id
    targets[every, target_lengths - 1] = eos_id
    return Examples(inputs, input_lengths, targets, target_lengths)


def restore(
    inputs: Integer[np.ndarray, " I"], targets: Integer[np.ndarray, " T"], *, top_sentinel: int, num_sentinels: int = 100
) -> Int32[np.ndarray, " L"]:
    """Returns the inverse of `span_corrupt` for one example without padding: the original tokens.

    Raises `ConfigError` where the inputs' and the targets' sentinels are not the same ones in the same order.
    """
    inputs, targets = np.asarray(inputs)[:-1], np.asarray(targets)[:-1]  # without EOS

    def is_sentinel(ids: np.ndarray) -> np.ndarray:
        return (ids > top_sentinel - num_sentinels) & (ids <= top_sentinel)

    places = np.flatnonzero(is_sentinel(targets))
    check(
        np.array_equal(inputs[is_sentinel(inputs)], targets[places]),
        f"Inputs and targets do not belong together: the inputs' sentinels are {inputs[is_sentinel(inputs)].tolist()}, the "
        f"targets' {targets[places].tolist()}.",
    )
    spans = [span[1:] for span in np.split(targets, places)[1:]]
    pieces = np.split(inputs, np.flatnonzero(is_sentinel(inputs)))
    restored = [pieces[0], *(part for span, piece in zip(spans, pieces[1:], strict=True) for part in (span, piece[1:]))]
    return np.concatenate(restored).astype(np.int32)


def settings_of(mixture: Mixture) -> dict[str, Any]:
    """Returns the keyword arguments of `span_corrupt` that a mixture has."""
    config = mixture.config
    noise = dict(noise_density=config.noise_density, mean_noise_span_length=config.mean_noise_span_length)
    return dict(top_sentinel=mixture.top_sentinel, eos_id=mixture.eos_id, **noise)


def spans_of_settings(config: DataConfig, lengths: Integer[np.ndarray, " *M"]) -> Int64[np.ndarray, " *M"]:
    """Returns how many spans of texts of these lengths are masked with the noise of a config."""
    return noise_counts(lengths, config.noise_density, config.mean_noise_span_length)[1]


def _longest_text(config: DataConfig) -> int:
    noise = (config.noise_density, config.mean_noise_span_length)
    return derived_raw_length(config.inputs_length, config.targets_length, *noise)[0]


OBJECTIVE = Objective(
    make=lambda mixture, tokens, lengths, keys, limits: span_corrupt(tokens, lengths, keys, **settings_of(mixture)),
    mode=np.zeros_like,  # R
    room=lambda mixture, lengths: corrupted_lengths(lengths, mixture.config.noise_density, mixture.config.mean_noise_span_length),
    longest_text=_longest_text,
    spans=spans_of_settings,
    told="the gaps alone come back",
)
