"""A small made-up language to read, tokenise and batch."""

import numpy as np
import pytest

from flax_switch.config import DataConfig
from flax_switch.data import Vocabulary, prepare

_SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu"]


def made_up_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 60 words; common words are common."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_SYLLABLES, size=rng.integers(1, 4))) for _ in range(300)]
    weights = 1 / np.arange(1, len(words) + 1)
    return [" ".join(rng.choice(words, size=rng.integers(3, 60), p=weights / weights.sum())) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return made_up_documents(800)


@pytest.fixture(scope="session")
def vocabulary(documents) -> Vocabulary:
    return Vocabulary.train(documents, 128, num_sentinels=20)


@pytest.fixture(scope="session")
def config(documents, tmp_path_factory) -> DataConfig:
    """Settings that read the made-up corpus from a file, with a cache of their own."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")
    return DataConfig(
        source=str(folder / "corpus.txt"), vocabulary_size=128, num_sentinels=20, inputs_length=32, targets_length=10,
        batch_size=8, heldout_fraction=0.1, cache_dir=str(folder / "cache"), seed=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def prepared(config, vocabulary):
    return prepare(config, vocabulary=vocabulary, quiet=True)
