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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Integer
from rich.console import Console

from flax_switch.config import DataConfig, check
from flax_switch.data import cache, corpus, packing, sources
from flax_switch.data.batches import Batch
from flax_switch.data.objectives import ConcatenatedText, Mixture, SeparateDocuments
from flax_switch.data.statistics import target_token_counts, unigram_entropy
from flax_switch.data.vocabulary import SETTINGS_FILE, Vocabulary
from flax_switch.host import files

if TYPE_CHECKING:  # the loader brings in grain, and grain brings in jax
    from flax_switch.data.loader import BatchMaker, TrainIterator

_HELDOUT_SEED = 20_210_111  # held-out examples and their masks are the same whatever the training's seed


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to read as often as needed, and a fingerprint of them."""

    documents: Callable[[], Iterable[str]]
    fingerprint: str
    total_characters: int | None = None

    @classmethod
    def of(cls, config: DataConfig, say: Callable[[str], None]) -> Corpus:
        """Opens the embedded default corpus, or the files that `config.source` names. Raises `ConfigError` where there are none."""
        if config.source == "default":
            documents = corpus.default_corpus(files.cache_folder(config.cache_dir), say)
            digest = hashlib.blake2b("\n".join(documents).encode(), digest_size=10).hexdigest()
            return cls(lambda: documents, digest, sum(map(len, documents)))
        paths = sources.find_files(config.source)
        return cls(
            functools.partial(sources.documents, paths, config.text_field, config.document_separator),
            sources.fingerprint(paths, config.text_field, config.document_separator),
            sources.total_bytes(paths),
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything batches are made of."""

    config: DataConfig
    vocabulary: Vocabulary
    mixture: Mixture
    train: cache.TokenStore
    heldout: cache.TokenStore

    @property
    def fingerprint(self) -> str:
        """Changes with the tokens (so with corpus and vocabulary) and with the way examples are made of them."""
        made = {**self.mixture.identity(), "packing": self.config.packing, **({"joined": True} if self.config.joined else {})}
        return hashlib.blake2b(f"{self.train.fingerprint} {json.dumps(made)}".encode(), digest_size=10).hexdigest()

    def describe(self) -> list[dict[str, Any]]:
        """Returns the corpus's source and its numbers of documents and tokens, as the one entry of a list."""
        numbers = {
            kind: {"documents": store.num_documents, "tokens": store.num_tokens}
            for kind, store in (("train", self.train), ("heldout", self.heldout))
        }
        return [{"source": self.config.source, **numbers}]

    def train_iterator(self, rows: Integer[np.ndarray, " rows"] | None = None, num_workers: int | None = None) -> TrainIterator:
        """Returns endless training batches, or of each the given rows: those that this process's devices hold.

        What is in a row depends on `config.seed` alone. `num_workers` overrides the config's.
        """
        from flax_switch.data.loader import TrainIterator

        return TrainIterator(
            self._train_maker,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            fingerprint=self.fingerprint,
            shuffle=self.config.shuffle,
            rows=rows,
            num_workers=self.config.num_workers if num_workers is None else num_workers,
            prefetch=self.config.prefetch,
        )

    def heldout_batches(self, count: int | None = None, rows: Integer[np.ndarray, " rows"] | None = None) -> Iterator[Batch]:
        """Makes the first `count` (or all) held-out batches, or the given rows of each: always the same examples and masks."""
        from flax_switch.data.loader import finite_batches

        return finite_batches(
            self._heldout_maker,
            self.config.batch_size,
            count,
            seed=_HELDOUT_SEED,
            rows=rows,
        )

    def heldout_probes(self, count: int, rows: Integer[np.ndarray, " rows"] | None = None) -> Iterator[tuple[Batch, Batch]]:
        """Yields the first held-out batches with their own inputs and with another row's (`loader.probe_batches`), never packed."""
        from flax_switch.data.loader import probe_batches

        lengths, size = (self.config.inputs_length, self.config.targets_length), self.config.batch_size
        source = ConcatenatedText(self.heldout, self.mixture, _HELDOUT_SEED, whole=True)
        return probe_batches(source, *lengths, size, count, seed=_HELDOUT_SEED, rows=rows)

    def heldout_unigram_entropy(self, count: int | None = None) -> float:
        """Returns nats per token of the held-out text targets' own unigram distribution, over the first `count` (or all) batches.

        A model that uses no context cannot have a lower cross-entropy over the same tokens (`batches.text_token_mask`).
        """
        batches = self.heldout_batches(count)
        return unigram_entropy(target_token_counts(batches, self.vocabulary.num_pieces, self.vocabulary.eos_id))

    @functools.cached_property
    def _train_maker(self) -> BatchMaker:
        return self._maker(self.train, self.config.seed, whole=False)

    @functools.cached_property
    def _heldout_maker(self) -> BatchMaker:
        return self._maker(self.heldout, _HELDOUT_SEED, whole=True)

    def _maker(self, store: cache.TokenStore, seed: int, whole: bool) -> BatchMaker:
        from flax_switch.data.loader import BatchMaker

        if not self.config.packing:
            return BatchMaker.of(ConcatenatedText(store, self.mixture, seed, whole=whole), self.config)
        source = SeparateDocuments(store, self.mixture, seed)
        lengths = (source.input_lengths, source.target_lengths, self.config.inputs_length, self.config.targets_length)
        plan = packing.plan_rows(*lengths, seed=seed, joined=self.config.joined)
        return BatchMaker.of(source, self.config, plan)


def prepare(
    config: DataConfig, *, workdir: epath.PathLike | None = None, vocabulary: Vocabulary | None = None, quiet: bool = False
) -> Prepared:
    """Reads the corpus, makes or loads the vocabulary, and tokenises; quick when repeated, as all of it is cached.

    The vocabulary is the given one, else the workdir's, else `config.vocabulary`'s, else one trained on the corpus; it is saved
    in `workdir/vocabulary`. Raises `ConfigError` for unusable input and for a workdir whose vocabulary is another one.
    """
    say = _silent if quiet else Console(highlight=False, soft_wrap=True).print
    text = Corpus.of(config, say)
    saved = epath.Path(workdir) / "vocabulary" if workdir is not None else None
    vocabulary = _vocabulary(config, text, saved, vocabulary, say)
    mixture = Mixture.of(config, vocabulary)
    stores = cache.tokenize(
        text.documents(),
        vocabulary,
        files.cache_folder(config.cache_dir),
        corpus_fingerprint=text.fingerprint,
        heldout_fraction=config.heldout_fraction,
        total_characters=text.total_characters,
        quiet=quiet,
    )
    check(
        stores["heldout"].num_tokens >= 2,
        f"No document fell into the held-out {config.heldout_fraction:.2%} of {stores['train'].num_documents}; raise "
        "data.heldout_fraction, or set data.document_separator so that the text has more documents.",
    )
    if saved is not None and not (saved / SETTINGS_FILE).exists():
        vocabulary.save(saved)
    train, heldout = stores["train"], stores["heldout"]
    say(
        f"Text: {train.num_documents:,} documents with {train.num_tokens:,} tokens for training, "
        f"{heldout.num_documents:,} with {heldout.num_tokens:,} held out."
    )
    return Prepared(config, vocabulary, mixture, stores["train"], stores["heldout"])


def _silent(_: str) -> None:
    pass


def _vocabulary(
    config: DataConfig, text: Corpus, saved: epath.Path | None, given: Vocabulary | None, say: Callable[[str], None]
) -> Vocabulary:
    if given is None and config.vocabulary is not None:
        given = Vocabulary.from_sentencepiece(config.vocabulary, config.num_sentinels)
    if saved is None or not (saved / SETTINGS_FILE).exists():
        return given or _trained(config, text, say)
    found = Vocabulary.load(saved)
    if given is None:
        same = (found.num_pieces, found.num_sentinels) == (config.vocabulary_size, config.num_sentinels)
        wanted = f"{config.vocabulary_size} pieces and {config.num_sentinels} sentinels trained on the corpus"
    else:
        same, wanted = found.fingerprint == given.fingerprint, repr(given)
    check(
        same,
        f"{saved} holds a vocabulary of {found!r}, but the config asks for {wanted}. Restore data.vocabulary, "
        "data.vocabulary_size and data.num_sentinels, or take a new workdir.",
    )
    return found


def _trained(config: DataConfig, text: Corpus, say: Callable[[str], None]) -> Vocabulary:
    """Returns a vocabulary trained on the corpus, from the cache if it was trained before."""
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
