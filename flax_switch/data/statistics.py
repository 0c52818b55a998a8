"""What a model that knows only how often tokens occur would reach: the entropy to compare its cross-entropy with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Integer

from flax_switch.data.batches import Batch, text_token_mask


def target_token_counts(batches: Iterable[Batch], num_pieces: int, eos_id: int = 1) -> Integer[np.ndarray, " num_pieces"]:
    """Returns how often each piece occurs among the text target tokens (sentinels, EOS and padding left out) of some batches."""
    counts = np.zeros(num_pieces, np.int64)
    for batch in batches:
        labels = batch["labels"]
        counts += np.bincount(labels[text_token_mask(labels, num_pieces, eos_id)], minlength=num_pieces)
    return counts


def most_frequent_share(counts: Integer[np.ndarray, " num_pieces"]) -> float:
    """Returns the share of the most frequent piece: how often a guess without context would be right."""
    return float(counts.max() / max(counts.sum(), 1))


def unigram_entropy(counts: Integer[np.ndarray, " num_pieces"]) -> float:
    """Returns the entropy in nats per token of the distribution that these counts are: the least cross-entropy without context."""
    seen = counts[counts > 0].astype(np.float64)
    return float(np.log(seen.sum()) - (seen * np.log(seen)).sum() / seen.sum()) if len(seen) else 0.0
