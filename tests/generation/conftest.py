"""Pairs of a small Hugging Face model, briefly trained, and of ours with the same weights."""

import numpy as np
import pytest
from huggingface_pair import huggingface_model, noisy_chains, pair, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A trained pair; Hugging Face's capacity of 64 drops nothing at these lengths."""
    return pair(train(huggingface_model(), 60), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def scarce(tmp_path_factory):
    """A trained pair in which an expert takes at most two tokens of a sequence."""
    return pair(train(huggingface_model(expert_capacity=2), 30), tmp_path_factory.mktemp("scarce"))


@pytest.fixture(scope="session")
def sources():
    """Six sources of different lengths, padded on the right: ids and mask."""
    ids, _ = noisy_chains(np.random.default_rng(7), 6)
    return ids.astype(np.int32), (ids != 0).astype(np.int32)
