"""Random numbers that are a pure function of (seed, epoch, example): the same whatever batch, process or worker asks.

Each example has a 64-bit key; its random words are SplitMix64's output from that key on. Unlike a generator with a state, whole
batches are drawn in a few array operations.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer, UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: UInt64[np.ndarray, "*dims"]) -> UInt64[np.ndarray, "*dims"]:
    """Applies SplitMix64's output function, a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def example_keys(seed: int, epochs: Integer[np.ndarray, " M"], examples: Integer[np.ndarray, " M"]) -> UInt64[np.ndarray, " M"]:
    """Returns one key for each (seed, epoch, example)."""
    with np.errstate(over="ignore"):
        keys = _mix(np.atleast_1d(np.uint64(seed % 2**64)) + _GAMMA)
        keys = _mix((keys ^ np.asarray(epochs).astype(np.uint64)) + _GAMMA)
        return _mix((keys ^ np.asarray(examples).astype(np.uint64)) + _GAMMA)


def fold_in(keys: UInt64[np.ndarray, " M"], purpose: int) -> UInt64[np.ndarray, " M"]:
    """Returns keys for another purpose, independent of those for any other."""
    return _mix(keys ^ _mix(np.atleast_1d(np.uint64(purpose)) + _GAMMA))


def random_words(keys: UInt64[np.ndarray, " M"], count: int) -> UInt64[np.ndarray, "M count"]:
    """Returns `count` random 64-bit words for each key."""
    return _mix(keys[:, None] + _GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def uniform(keys: UInt64[np.ndarray, " M"]) -> np.ndarray:
    """Returns one float64 in [0, 1) for each key."""
    return (random_words(keys, 1)[:, 0] >> np.uint64(11)) * 2.0**-53
