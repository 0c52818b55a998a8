"""Held-out examples by the kind of document that they are from: for a look at what a model does with each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from flax_switch.config import DataConfig
from flax_switch.data import cache, corpus, sources
from flax_switch.data.batches import Batch, join_batch, pad_batch
from flax_switch.data.objectives import Mixture
from flax_switch.data.random_bits import example_keys
from flax_switch.data.vocabulary import Vocabulary

_SEED = 20_210_111
_FILES = 16  # of a stream


def heldout_by_kind(config: DataConfig, vocabulary: Vocabulary, most_rows: int, fewest_rows: int) -> dict[str, Batch]:
    """Returns for each kind a batch of at most `most_rows` held-out examples; kinds of fewer than `fewest_rows` are left out.

    A kind is where a document is from: a source of a mixture, else a file of `config.source` (of a stream one of the first), or
    of the embedded corpus the reference, the library, a package.
    Each row is full, and the same rows come every time.
    """
    mixture, batches = Mixture.of(config, vocabulary), {}
    for kind, documents in _kinds(config):
        tokens = _tokens(documents, config.heldout_fraction, vocabulary, most_rows * mixture.raw_length)
        rows = len(tokens) // mixture.raw_length
        if rows >= fewest_rows:
            texts = tokens[: rows * mixture.raw_length].reshape(rows, mixture.raw_length)
            keys = example_keys(_SEED, np.zeros(rows, np.int64), np.arange(rows))
            examples = mixture(texts, np.full(rows, mixture.raw_length), keys)
            length = config.inputs_length + config.targets_length
            batches[kind] = (
                join_batch(examples, np.arange(rows), rows, length)
                if config.joined
                else pad_batch(examples, config.inputs_length, config.targets_length)
            )
    return batches


def _kinds(config: DataConfig) -> Iterator[tuple[str, Iterator[str]]]:
    read = (config.text_field, config.document_separator)
    for source in config.sources:
        if source.source == "default":
            yield from ((name, iter(documents)) for name, documents in corpus.by_origin().items())
            continue
        paths = sources.find_files(source.source)
        if config.mixture:
            yield source.name, sources.first_documents(paths, config.first_documents, *read)
        else:
            for path in paths[:_FILES] if config.streamed else paths:
                yield (
                    path.name,
                    itertools.islice(sources.documents_of(path, *read), config.first_documents if config.streamed else None),
                )


def _tokens(documents: Iterator[str], heldout_fraction: float, vocabulary: Vocabulary, most: int) -> np.ndarray:
    """Returns at most so many tokens of the held-out documents, end to end."""
    found: list[int] = []
    for document in documents:
        if cache.is_heldout(document, heldout_fraction):
            found += vocabulary.encode_documents([document])[0]
        if len(found) >= most:
            break
    return np.asarray(found[:most], np.int32)
