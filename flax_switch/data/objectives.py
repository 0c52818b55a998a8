"""From tokenised text to examples: chunks of text, and for each the objective that the mixture's rates draw for it."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt64

from flax_switch.config import DataConfig
from flax_switch.data.cache import TokenStore
from flax_switch.data.examples import Examples
from flax_switch.data.prefix_lm import prefix_lm
from flax_switch.data.random_bits import example_keys, fold_in, uniform
from flax_switch.data.span_corruption import corrupted_lengths, derived_raw_length, span_corrupt
from flax_switch.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Span corruption and prefix-LM with their rates; which of them an example gets depends on its key alone."""

    span_corruption_rate: float
    prefix_lm_rate: float
    noise_density: float
    mean_noise_span_length: float
    inputs_length: int
    targets_length: int
    top_sentinel: int
    eos_id: int
    raw_length: int  # tokens in a full chunk

    @classmethod
    def of(cls, config: DataConfig, vocabulary: Vocabulary) -> Mixture:
        """Raises `ConfigError` where the lengths or the number of sentinels do not suffice."""
        if config.span_corruption_rate > 0:
            raw_length, _ = derived_raw_length(
                config.inputs_length,
                config.targets_length,
                config.noise_density,
                config.mean_noise_span_length,
                vocabulary.num_sentinels,
            )
        else:
            raw_length = config.inputs_length + config.targets_length - 2
        names = [field.name for field in dataclasses.fields(cls)][:6]
        return cls(
            **{name: getattr(config, name) for name in names},
            top_sentinel=vocabulary.size - 1,
            eos_id=vocabulary.eos_id,
            raw_length=raw_length,
        )

    def lengths(self, lengths: Integer[np.ndarray, " M"]) -> tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
        """Room for the inputs and targets of texts of these lengths, whichever objective they get."""
        if self.span_corruption_rate > 0:
            return corrupted_lengths(lengths, self.noise_density, self.mean_noise_span_length)
        targets = np.minimum(lengths // 2 + 1, self.targets_length)
        return np.minimum(lengths - targets + 2, self.inputs_length), targets

    def __call__(
        self, tokens: Integer[np.ndarray, "M L"], lengths: Integer[np.ndarray, " M"], keys: UInt64[np.ndarray, " M"],
        *, limits: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Examples:  # fmt: skip
        """Examples of M texts. `limits` (for packing) are lengths of inputs and targets that prefix-LM must keep to."""
        share = self.span_corruption_rate / (self.span_corruption_rate + self.prefix_lm_rate)
        corrupted = uniform(fold_in(keys, 0)) < share
        if corrupted.all():
            return self._span_corrupt(tokens, lengths, keys)
        inputs_limit, targets_limit = limits or (
            np.full(len(keys), self.inputs_length),
            np.full(len(keys), self.targets_length),
        )
        continued = ~corrupted
        prefixes = prefix_lm(
            tokens[continued],
            lengths[continued],
            keys[continued],
            inputs_length=inputs_limit[continued],
            targets_length=targets_limit[continued],
            eos_id=self.eos_id,
        )
        if continued.all():
            return prefixes
        return _interleaved(corrupted, self._span_corrupt(tokens[corrupted], lengths[corrupted], keys[corrupted]), prefixes)

    def _span_corrupt(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Examples:
        return span_corrupt(
            tokens,
            lengths,
            keys,
            top_sentinel=self.top_sentinel,
            eos_id=self.eos_id,
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
        )


def _interleaved(first: np.ndarray, ones: Examples, others: Examples) -> Examples:
    """Examples in their batch's order: `ones` where `first` holds, `others` elsewhere."""

    def merged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = np.zeros((len(first), *np.maximum(a.shape[1:], b.shape[1:])), a.dtype)
        both[(first, *map(slice, a.shape[1:]))] = a
        both[(~first, *map(slice, b.shape[1:]))] = b
        return both

    return Examples(*(merged(a, b) for a, b in zip(ones, others, strict=True)))


class ConcatenatedText:
    """All documents of a split end to end, cut into chunks; each epoch cuts at another place.

    `whole` keeps the short chunk at the end and always cuts at the same places: for evaluation.
    """

    def __init__(self, store: TokenStore, mixture: Mixture, seed: int, *, whole: bool = False):
        self.store, self.mixture, self.seed = store, mixture, seed
        self.raw_length = mixture.raw_length
        shifted = (store.num_tokens - self.raw_length + 1) // self.raw_length
        self.shifts = not whole and shifted > 0
        self.num_examples = shifted if self.shifts else -(-store.num_tokens // self.raw_length)

    def examples(self, ids: Integer[np.ndarray, " M"], epochs: Integer[np.ndarray, " M"]) -> Examples:
        """The examples with these numbers in these epochs."""
        starts = ids * self.raw_length
        if self.shifts:
            shift = uniform(example_keys(self.seed, epochs, np.full_like(epochs, -1)))
            starts = starts + (shift * self.raw_length).astype(np.int64)
        lengths = np.minimum(self.raw_length, self.store.num_tokens - starts)
        return self.mixture(_gather(self.store, starts, lengths), lengths, example_keys(self.seed, epochs, ids))


class SeparateDocuments:
    """Every document by itself, cut into chunks where it is longer than one: for packing, which keeps documents apart."""

    def __init__(self, store: TokenStore, mixture: Mixture, seed: int):
        self.store, self.mixture, self.seed = store, mixture, seed
        documents = np.diff(store.offsets)
        chunks = -(-documents // mixture.raw_length)
        document = np.repeat(np.arange(len(documents)), chunks)
        within = np.arange(len(document)) - (np.cumsum(chunks) - chunks)[document]
        self.starts = np.asarray(store.offsets)[document] + within * mixture.raw_length
        self.lengths = np.minimum(mixture.raw_length, np.asarray(store.offsets)[document + 1] - self.starts)
        long_enough = self.lengths >= 2  # of a single token nothing can be masked
        self.starts, self.lengths = self.starts[long_enough], self.lengths[long_enough]
        self.num_examples = len(self.starts)
        self.input_lengths, self.target_lengths = mixture.lengths(self.lengths)

    def examples(self, ids: Integer[np.ndarray, " M"], epochs: Integer[np.ndarray, " M"]) -> Examples:
        """The examples with these numbers in these epochs."""
        tokens = _gather(self.store, self.starts[ids], self.lengths[ids])
        limits = (self.input_lengths[ids], self.target_lengths[ids])
        return self.mixture(tokens, self.lengths[ids], example_keys(self.seed, epochs, ids), limits=limits)


def _gather(store: TokenStore, starts: Int64[np.ndarray, " M"], lengths: Int64[np.ndarray, " M"]) -> Int32[np.ndarray, "M L"]:
    """Runs of tokens as padded rows; what lies past a length is arbitrary."""
    columns = np.arange(int(lengths.max(initial=1)))
    return store.tokens[np.minimum(starts[:, None] + columns, store.num_tokens - 1)].astype(np.int32)
