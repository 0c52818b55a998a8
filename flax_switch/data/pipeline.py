"""From a `DataConfig` to batches: corpus, vocabulary, token cache, and the iterators that training and evaluation read.

prepared = prepare(config.data, workdir=workdir)
batches = prepared.train_iterator()
batch = next(batches)               # {"input_ids": [B, inputs_length], "labels": [B, targets_length], ...}, int32
state = batches.get_state()         # JSON-able; set_state continues exactly there
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Integer
from rich.console import Console

from flax_switch.config import DataConfig, check
from flax_switch.data import cache
from flax_switch.data.batches import Batch
from flax_switch.data.objectives import Mixture
from flax_switch.data.statistics import target_token_counts, unigram_entropy
from flax_switch.data.texts import Corpus, Streamed, Text
from flax_switch.data.vocabulary import SETTINGS_FILE, Vocabulary
from flax_switch.host import files

if TYPE_CHECKING:  # the loader brings in grain, and grain brings in jax
    from flax_switch.data.loader import BatchMaker, TrainIterator
    from flax_switch.data.streams import StreamIterator

_HELDOUT_SEED = 20_210_111  # held-out examples and their masks are the same whatever the training's seed


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything batches are made of."""

    config: DataConfig
    vocabulary: Vocabulary
    mixture: Mixture
    texts: tuple[Text, ...]

    @property
    def train(self) -> cache.TokenStore | Streamed:
        """The text that is trained on, where there is one source alone."""
        (text,) = self.texts
        return text.train

    @property
    def heldout(self) -> cache.TokenStore:
        """The held-out text, where there is one source alone."""
        (text,) = self.texts
        return text.heldout

    @property
    def fingerprint(self) -> str:
        """Changes with the tokens (so with corpus and vocabulary) and with the way examples are made of them."""
        made = {**self.mixture.identity(), "packing": self.config.packing, **({"joined": True} if self.config.joined else {})}
        if len(self.texts) > 1:
            made["weights"] = self._weights
        texts = " ".join(text.train.fingerprint for text in self.texts)
        return hashlib.blake2b(f"{texts} {json.dumps(made)}".encode(), digest_size=10).hexdigest()

    @property
    def rates(self) -> list[Fraction]:
        """The sources' shares of the rows."""
        from flax_switch.data.mixtures import mixing_rates

        return mixing_rates(self.config, [text.size for text in self.texts]) if len(self.texts) > 1 else [Fraction(1)]

    @property
    def _weights(self) -> tuple[int, ...]:
        from flax_switch.data.mixtures import integer_weights

        return integer_weights(self.rates)

    def describe(self) -> list[dict[str, Any]]:
        """Returns of every source its numbers of documents and tokens; of several their names and rates, too."""
        if len(self.texts) == 1:
            return [self.texts[0].describe()]
        rates = zip(self.texts, self.rates, strict=True)
        return [{"name": text.name, "rate": float(rate), **text.describe()} for text, rate in rates]

    def train_iterator(
        self, rows: Integer[np.ndarray, " rows"] | None = None, num_workers: int | None = None
    ) -> TrainIterator | StreamIterator:
        """Returns endless training batches, or of each the given rows: those that this process's devices hold.

        What is in a row depends on `config.seed` alone. `num_workers` overrides the config's.
        """
        from flax_switch.data.loader import TrainIterator
        from flax_switch.data.mixtures import Turns, seed_of

        workers = self.config.num_workers if num_workers is None else num_workers
        if self.config.streamed:
            from flax_switch.data.streams import BatchReader, StreamIterator, TextStream

            files = [text.train.paths for text in self.texts if isinstance(text.train, Streamed)]
            seeds = [seed_of(self.config.seed, k) for k in range(len(files))]
            streams = [TextStream(p, self.config, self.vocabulary, s) for p, s in zip(files, seeds, strict=True)]
            turns = Turns((0,) * len(streams), self._weights)
            reader = BatchReader.of(streams, self._mixture, turns, rows)
            return StreamIterator(reader, fingerprint=self.fingerprint, num_workers=workers)
        return TrainIterator(
            self._train_maker,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            fingerprint=self.fingerprint,
            shuffle=self.config.shuffle,
            rows=rows,
            num_workers=workers,
            prefetch=self.config.prefetch,
            turns=Turns(self._train_rows[1], self._weights) if len(self.texts) > 1 else None,
        )

    def heldout_batches(
        self, count: int | None = None, rows: Integer[np.ndarray, " rows"] | None = None, text: int | None = None
    ) -> Iterator[Batch]:
        """Makes the first `count` (or all) held-out batches, or the given rows of each: always the same examples and masks.

        text: the number of the source that they are of; None: of all.
        """
        from flax_switch.data.loader import finite_batches

        maker = self._heldout_maker(text)
        return finite_batches(maker, self.config.batch_size, count, seed=_HELDOUT_SEED, rows=rows)

    def heldout_probes(self, count: int, rows: Integer[np.ndarray, " rows"] | None = None) -> Iterator[tuple[Batch, Batch]]:
        """Yields the first held-out batches with their own inputs and with another row's (`loader.probe_batches`), never packed."""
        from flax_switch.data.loader import probe_batches
        from flax_switch.data.mixtures import text_maker

        lengths, size = (self.config.inputs_length, self.config.targets_length), self.config.batch_size
        unpacked = self._mixture.replace(packing=False)
        maker, _ = text_maker([text.heldout for text in self.texts], unpacked, _HELDOUT_SEED, whole=True)
        return probe_batches(maker.source, *lengths, size, count, seed=_HELDOUT_SEED, rows=rows)

    def heldout_unigram_entropy(self, count: int | None = None) -> float:
        """Returns nats per token of the held-out text targets' own unigram distribution, over the first `count` (or all) batches.

        A model that uses no context cannot have a lower cross-entropy over the same tokens (`batches.text_token_mask`).
        """
        batches = self.heldout_batches(count)
        return unigram_entropy(target_token_counts(batches, self.vocabulary.num_pieces, self.vocabulary.eos_id))

    @property
    def _mixture(self) -> Mixture:
        return dataclasses.replace(self.mixture, config=self.config)

    @property
    def _train_maker(self) -> BatchMaker:
        return self._train_rows[0]

    @functools.cached_property
    def _train_rows(self) -> tuple[BatchMaker, tuple[int, ...]]:
        from flax_switch.data.mixtures import text_maker

        stores = [text.train for text in self.texts if isinstance(text.train, cache.TokenStore)]
        maker, sizes = text_maker(stores, self._mixture, self.config.seed, whole=False)
        for text, size in zip(self.texts, sizes, strict=True):
            check(size > 0, f"There is not a single training example in {text.source}; it is too small.")
        return maker, sizes

    @functools.cached_property
    def _heldout_makers(self) -> dict[int | None, BatchMaker]:
        return {}

    def _heldout_maker(self, number: int | None) -> BatchMaker:
        from flax_switch.data.mixtures import text_maker

        if number not in self._heldout_makers:
            stores = [text.heldout for text in (self.texts if number is None else self.texts[number : number + 1])]
            self._heldout_makers[number], _ = text_maker(stores, self._mixture, _HELDOUT_SEED, whole=True)
        return self._heldout_makers[number]


def prepare(
    config: DataConfig, *, workdir: epath.PathLike | None = None, vocabulary: Vocabulary | None = None, quiet: bool = False
) -> Prepared:
    """Reads the corpus, makes or loads the vocabulary, and tokenises; quick when repeated, as all of it is cached.

    The vocabulary is the given one, else the workdir's, else `config.vocabulary`'s, else one trained on the corpus; it is saved
    in `workdir/vocabulary`. Raises `ConfigError` for unusable input and for a workdir whose vocabulary is another one.
    """
    say = _silent if quiet else Console(highlight=False, soft_wrap=True).print
    found = [Corpus.of(source, config, say) for source in config.sources]
    saved = epath.Path(workdir) / "vocabulary" if workdir is not None else None
    vocabulary = _vocabulary(config, found, saved, vocabulary, say)
    mixture = Mixture.of(config, vocabulary)
    texts = [Text.of(source, text, config, vocabulary, quiet) for source, text in zip(config.sources, found, strict=True)]
    if saved is not None and not (saved / SETTINGS_FILE).exists():
        vocabulary.save(saved)
    prepared = Prepared(config, vocabulary, mixture, tuple(texts))
    for text, rate in zip(texts, prepared.rates, strict=True):
        say(f"{f'{text.name}, {float(rate):.1%} of the rows' if config.mixture else 'Text'}: {text.told()}")
    return prepared


def _silent(_: str) -> None:
    pass


def _vocabulary(
    config: DataConfig, found: list[Corpus], saved: epath.Path | None, given: Vocabulary | None, say: Callable[[str], None]
) -> Vocabulary:
    if given is None and config.vocabulary is not None:
        given = Vocabulary.from_sentencepiece(config.vocabulary, config.num_sentinels)
    if saved is None or not (saved / SETTINGS_FILE).exists():
        return given or _trained(config, found, say)
    known = Vocabulary.load(saved)
    if given is None:
        same = (known.num_pieces, known.num_sentinels) == (config.vocabulary_size, config.num_sentinels)
        wanted = f"{config.vocabulary_size} pieces and {config.num_sentinels} sentinels trained on the corpus"
    else:
        same, wanted = known.fingerprint == given.fingerprint, repr(given)
    check(
        same,
        f"{saved} holds a vocabulary of {known!r}, but the config asks for {wanted}. Restore data.vocabulary, "
        "data.vocabulary_size and data.num_sentinels, or take a new workdir.",
    )
    return known


def _trained(config: DataConfig, found: list[Corpus], say: Callable[[str], None]) -> Vocabulary:
    """Returns a vocabulary trained on the corpus, from the cache if it was trained before; of several sources at their rates."""
    from flax_switch.data.mixtures import mixing_rates

    text = Corpus.joined(found, mixing_rates(config, [one.size for one in found]) if len(found) > 1 else [])
    name = f"vocabulary-{text.fingerprint}-{config.vocabulary_size}-{config.num_sentinels}"
    folder = files.cache_folder(config.cache_dir) / name
    if not folder.is_dir():
        sentinels = f"and {config.num_sentinels} sentinels, <extra_id_0> and so on" if config.num_sentinels else ""
        say(f"Training a vocabulary of {config.vocabulary_size} pieces on the corpus {sentinels}".rstrip() + ".")
        training = (d for d in text.documents() if not cache.is_heldout(d, config.heldout_fraction))
        vocabulary = Vocabulary.train(training, config.vocabulary_size, config.num_sentinels)
        with files.new_folder(folder) as temporary:
            vocabulary.save(temporary)
    return Vocabulary.load(folder)
