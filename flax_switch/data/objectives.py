"""From tokenised text to examples: chunks of text, and for each the objective that the mixture's rates draw for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32, Int64, Integer, UInt64

from flax_switch.config import DataConfig, check
from flax_switch.data import causal_lm, infilling, prefix_lm, span_corruption, ul2
from flax_switch.data.cache import Tokens
from flax_switch.data.examples import MODES, Examples, Lengths, Objective
from flax_switch.data.random_bits import example_keys, fold_in, uniform
from flax_switch.data.span_corruption import check_sentinels
from flax_switch.data.vocabulary import Vocabulary

# The objectives by the name that `data.NAME_rate` has. An example's `objective` is an index, so that a new one comes last.
OBJECTIVES: dict[str, Objective] = {
    "span_corruption": span_corruption.OBJECTIVE,
    "prefix_lm": prefix_lm.OBJECTIVE,
    "infilling": infilling.OBJECTIVE,
    "ul2": ul2.OBJECTIVE,
    "causal_lm": causal_lm.OBJECTIVE,
}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Objectives at their rates; which of them an example gets depends on its key alone."""

    config: DataConfig
    top_sentinel: int
    eos_id: int
    raw_length: int  # tokens in a full chunk
    last_sentinel: int = 0  # the id of the sentinel with the highest number, which is the lowest of them
    word_starts: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)  # [pieces]

    @classmethod
    def of(cls, config: DataConfig, vocabulary: Vocabulary) -> Mixture:
        """Raises `ConfigError` where the lengths or the number of sentinels do not suffice."""
        used = [objective for name, objective in OBJECTIVES.items() if rate(config, name)]
        raw_length = min(o.longest_text(config.replace(inputs_length=config.inputs_length - marks(config, o))) for o in used)
        modes = MODES * config.mode_tokens
        check(
            vocabulary.num_sentinels >= modes,
            f"data.mode_tokens needs {modes} sentinels; the vocabulary has {vocabulary.num_sentinels}. Raise data.num_sentinels.",
        )
        spans = max(int(o.spans(config, np.asarray(raw_length))) if o.spans else 0 for o in used)
        check_sentinels(raw_length, spans, vocabulary.num_sentinels - modes)
        top = vocabulary.num_pieces + vocabulary.num_sentinels - 1
        words = vocabulary.word_starts if config.infilling_words else None
        return cls(config, top, vocabulary.eos_id, raw_length, vocabulary.num_pieces, words)

    def replace(self, **changes: Any) -> Mixture:
        """Returns a copy with other settings of `config`."""
        return dataclasses.replace(self, config=self.config.replace(**changes))

    @property
    def rates(self) -> dict[str, float]:
        """The rates of the objectives that have a part in it."""
        return {name: rate(self.config, name) for name in OBJECTIVES if rate(self.config, name)}

    def identity(self) -> dict[str, Any]:
        """Returns what tells this way of making examples from others.

        An objective that has no part in it is not named, but for two: streams of before there were more go on.
        """
        names = ("noise_density", "mean_noise_span_length", "inputs_length", "targets_length")
        names += tuple(name for name in ("mode_tokens", "infilling_words") if getattr(self.config, name))
        rates = {f"{name}_rate": value for name, value in ({"span_corruption": 0.0, "prefix_lm": 0.0} | self.rates).items()}
        made = {name: getattr(self, name) for name in ("top_sentinel", "eos_id", "raw_length")}
        return {**rates, **{name: getattr(self.config, name) for name in names}, **made}

    def lengths(self, lengths: Integer[np.ndarray, " M"]) -> Lengths:
        """Returns the room that inputs and targets of texts of these lengths need, whichever objective they get."""
        used = [OBJECTIVES[name] for name in self.rates]
        firm = [objective for objective in used if not objective.fits_any_room] or used[:1]
        inputs, targets = zip(*(objective.room(self, lengths) for objective in firm), strict=True)
        marked = [length + marks(self.config, objective) for objective, length in zip(firm, inputs, strict=True)]
        return np.minimum(np.max(marked, axis=0), self.config.inputs_length), np.max(targets, axis=0)

    def __call__(
        self, tokens: Integer[np.ndarray, "M L"], lengths: Integer[np.ndarray, " M"], keys: UInt64[np.ndarray, " M"],
        *, limits: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Examples:  # fmt: skip
        """Makes examples of M texts. `limits` (for packing) are lengths of inputs and targets that prefix-LM must keep to."""
        limits = limits or (np.full(len(keys), self.config.inputs_length), np.full(len(keys), self.config.targets_length))
        chosen = self._objectives(keys)
        parts = []
        for number in np.unique(chosen) if len(chosen) else (0,):  # a process may have no row of a batch
            rows = np.flatnonzero(chosen == number)
            objective = list(OBJECTIVES.values())[number]
            mode = objective.mode if marks(self.config, objective) else None
            room = (limits[0][rows] - (mode is not None), limits[1][rows])
            made = objective.make(self, tokens[rows], lengths[rows], keys[rows], room)
            parts.append((rows, made if mode is None else _begin_with(self.last_sentinel + mode(keys[rows]), made)))
        if len(parts) == 1:
            return parts[0][1]._replace(objective=chosen)
        return in_order(parts, len(keys))._replace(objective=chosen)

    def _objectives(self, keys: UInt64[np.ndarray, " M"]) -> Int8[np.ndarray, " M"]:
        """Draws an index into OBJECTIVES for every key."""
        rates = np.array([rate(self.config, name) for name in OBJECTIVES])
        ends = np.cumsum(rates) / rates.sum()
        last = int(np.flatnonzero(rates)[-1])  # rounding must not choose one of rate 0
        return np.minimum(np.searchsorted(ends, uniform(fold_in(keys, 0)), side="right"), last).astype(np.int8)


def rate(config: DataConfig, objective: str) -> float:
    """Returns an objective's rate in the mixture that a config asks for."""
    return getattr(config, f"{objective}_rate")


def marks(config: DataConfig, objective: Objective) -> bool:
    """Returns whether an objective's inputs begin with a token that tells it from others."""
    return config.mode_tokens and objective.mode is not None


def _begin_with(tokens: Integer[np.ndarray, " M"], examples: Examples) -> Examples:
    """Puts a token before the inputs of every example."""
    inputs = np.column_stack([tokens.astype(np.int32), examples.inputs])
    return examples._replace(inputs=inputs, input_lengths=examples.input_lengths + 1)


def in_order(parts: list[tuple[np.ndarray, Examples]], count: int) -> Examples:
    """Puts parts of a batch, each with the rows that it is of, together; `objective` and `hidden` where some part has one."""

    def merged(arrays: list[np.ndarray]) -> np.ndarray:
        width = np.max([a.shape[1:] for a in arrays], axis=0, initial=0)
        whole = np.zeros((count, *(int(w) for w in np.atleast_1d(width)[: arrays[0].ndim - 1])), arrays[0].dtype)
        for (rows, _), array in zip(parts, arrays, strict=True):
            whole[(rows, *map(slice, array.shape[1:]))] = array
        return whole

    made = [examples for _, examples in parts]
    hidden = None
    if any(examples.hidden is not None for examples in made):
        hidden = merged([np.ones(e.targets.shape, bool) if e.hidden is None else e.hidden for e in made])
    objectives = [examples.objective for examples in made if examples.objective is not None]
    columns: Any = zip(*(e[:4] for e in made), strict=True)
    inputs, input_lengths, targets, target_lengths = (merged(list(arrays)) for arrays in columns)
    objective = merged(objectives) if objectives else None
    return Examples(inputs, input_lengths, targets, target_lengths, objective, hidden)


class ConcatenatedText:
    """All documents of a split end to end, cut into chunks; each epoch cuts at another place.

    `whole` keeps the short chunk at the end and always cuts at the same places: for evaluation.
    """

    def __init__(self, store: Tokens, mixture: Mixture, seed: int, *, whole: bool = False):
        self.store, self.mixture, self.seed = store, mixture, seed
        self.raw_length = mixture.raw_length
        shifted = (store.num_tokens - self.raw_length + 1) // self.raw_length
        self.shifts = not whole and shifted > 0
        self.num_examples = shifted if self.shifts else -(-store.num_tokens // self.raw_length)

    def examples(self, ids: Integer[np.ndarray, " M"], epochs: Integer[np.ndarray, " M"]) -> Examples:
        """Returns the examples with these numbers in these epochs."""
        starts = ids * self.raw_length
        if self.shifts:
            shift = uniform(example_keys(self.seed, epochs, np.full_like(epochs, -1)))
            starts = starts + (shift * self.raw_length).astype(np.int64)
        lengths = np.minimum(self.raw_length, self.store.num_tokens - starts)
        return self.mixture(_gather(self.store, starts, lengths), lengths, example_keys(self.seed, epochs, ids))


class SeparateDocuments:
    """Every document by itself, cut into chunks where it is longer than one: for packing, which keeps documents apart."""

    def __init__(self, store: Tokens, mixture: Mixture, seed: int):
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
        """Returns the examples with these numbers in these epochs."""
        tokens = _gather(self.store, self.starts[ids], self.lengths[ids])
        limits = (self.input_lengths[ids], self.target_lengths[ids])
        return self.mixture(tokens, self.lengths[ids], example_keys(self.seed, epochs, ids), limits=limits)


def _gather(store: Tokens, starts: Int64[np.ndarray, " M"], lengths: Int64[np.ndarray, " M"]) -> Int32[np.ndarray, "M L"]:
    """Runs of tokens as padded rows; what lies past a length is arbitrary."""
    columns = np.arange(int(lengths.max(initial=1)))
    return store.tokens[np.minimum(starts[:, None] + columns, store.num_tokens - 1)].astype(np.int32)
