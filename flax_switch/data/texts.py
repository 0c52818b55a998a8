"""Sources of text, opened: documents to read, their tokens once they are known, and several sources as one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from flax_switch.config import DataConfig, SourceConfig, check
from flax_switch.data import cache, corpus, sources
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.host import files


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to read as often as needed (those of a stream are the first ones of its files), and a fingerprint of them."""

    documents: Callable[[], Iterable[str]]
    fingerprint: str
    size: int  # characters of the embedded corpus, bytes of files
    total_characters: int | None = None
    paths: tuple[Path, ...] = ()  # of a stream

    @classmethod
    def of(cls, source: SourceConfig, config: DataConfig, say: Callable[[str], None]) -> Corpus:
        """Opens the embedded default corpus, or the files that a source names. Raises `ConfigError` where there are none."""
        if source.source == "default":
            documents = corpus.default_corpus(files.cache_folder(config.cache_dir), say)
            digest = hashlib.blake2b("\n".join(documents).encode(), digest_size=10).hexdigest()
            characters = sum(map(len, documents))
            return cls(lambda: documents, digest, characters, characters)
        paths = sources.find_files(source.source)
        read = (config.text_field, config.document_separator)
        fingerprint, size = sources.fingerprint(paths, *read), sources.total_bytes(paths)
        if config.streamed:
            first = functools.partial(sources.first_documents, paths, config.first_documents, *read)
            return cls(first, f"{fingerprint}-{config.first_documents}", size, paths=tuple(paths))
        return cls(functools.partial(sources.documents, paths, *read), fingerprint, size, sources.text_bytes(paths))

    @classmethod
    def joined(cls, parts: Sequence[Corpus], rates: Sequence[Fraction]) -> Corpus:
        """Returns the documents of several, which take turns so that each has its rate of the characters as long as it lasts."""
        if len(parts) == 1:
            return parts[0]
        named = " ".join(f"{part.fingerprint} {rate}" for part, rate in zip(parts, rates, strict=True))
        digest = hashlib.blake2b(named.encode(), digest_size=10).hexdigest()
        return cls(lambda: _in_turns([part.documents() for part in parts], rates), digest, sum(part.size for part in parts))


def _in_turns(parts: Sequence[Iterable[str]], rates: Sequence[Fraction]) -> Iterator[str]:
    left = {k: iter(part) for k, part in enumerate(parts)}
    read = dict.fromkeys(left, 0)
    while left:
        k = min(left, key=lambda k: (read[k] / rates[k], k))
        document = next(left[k], None)
        if document is None:
            del left[k]
        else:
            read[k] += len(document)
            yield document


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The files that a stream reads; the fingerprint changes with them, the vocabulary and what is held out and shuffled."""

    paths: tuple[Path, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Text:
    """One source: what is trained on, and what is held out."""

    name: str
    source: str | tuple[str, ...]
    train: cache.TokenStore | Streamed
    heldout: cache.TokenStore
    size: int  # by which it is drawn from a mixture: tokens, of a stream bytes

    @classmethod
    def of(cls, source: SourceConfig, found: Corpus, config: DataConfig, vocabulary: Vocabulary, quiet: bool) -> Text:
        """Tokenises a source, or of a stream the held-out documents among the first ones; quick when repeated."""
        options: dict[str, Any] = dict(corpus_fingerprint=found.fingerprint, total_characters=found.total_characters, quiet=quiet)
        folder, fraction = files.cache_folder(config.cache_dir), config.heldout_fraction
        if not found.paths:
            stores = cache.tokenize(found.documents(), vocabulary, folder, heldout_fraction=fraction, **options)
            train, size = stores["train"], stores["train"].num_tokens
            _check_held_out(
                stores["heldout"].num_tokens >= 2,
                config,
                f"of {train.num_documents}",
                "set data.document_separator so that the text has more documents",
            )
        else:
            options["corpus_fingerprint"] += f" held out: {fraction!r}"
            held_out = _held_out(found.documents(), config)
            stores = cache.tokenize(held_out, vocabulary, folder, heldout_fraction=1.0, **options)
            read = f"{found.fingerprint} {vocabulary.fingerprint} {fraction!r} {config.shuffle_buffer}"
            train = Streamed(found.paths, hashlib.blake2b(read.encode(), digest_size=10).hexdigest())
            size = found.size
        return cls(source.name, source.source, train, stores["heldout"], size)

    def describe(self) -> dict[str, Any]:
        """Returns the source and its numbers of documents and tokens."""
        numbers = {
            kind: {"files, read as a stream": len(store.paths)}
            if isinstance(store, Streamed)
            else {"documents": store.num_documents, "tokens": store.num_tokens}
            for kind, store in (("train", self.train), ("heldout", self.heldout))
        }
        return {"source": self.source, **numbers}

    def told(self) -> str:
        """Returns the same in a sentence."""
        held, tokens = f"{self.heldout.num_documents:,}", f"{self.heldout.num_tokens:,}"
        if isinstance(self.train, Streamed):
            return (
                f"{len(self.train.paths):,} files, read while they are trained on; {held} documents with {tokens} tokens held out."
            )
        trained = f"{self.train.num_documents:,} documents with {self.train.num_tokens:,} tokens for training"
        return f"{trained}, {held} with {tokens} held out."


def _held_out(documents: Iterable[str], config: DataConfig) -> Iterator[str]:
    """Yields the held-out ones of a stream's first documents."""
    found = False
    for document in documents:
        if cache.is_heldout(document, config.heldout_fraction):
            found = True
            yield document
    _check_held_out(found, config, f"of the first {config.first_documents:,}", "data.first_documents")


def _check_held_out(found: bool, config: DataConfig, of_all: str, else_: str) -> None:
    fraction = f"{config.heldout_fraction:.2%}"
    check(found, f"No document fell into the held-out {fraction} {of_all}; raise data.heldout_fraction, or {else_}.")
