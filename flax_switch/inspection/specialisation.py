"""What routers' choices say, as figures: pure functions of arrays of expert numbers, without a model.

Letters: M tokens, N choices of each, E experts. Saturation and co-activation are those of OLMoE (2409.02060, section 4).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer

_SHUFFLES = 4  # mean of so many, for what chance alone would give


def saturation(chosen: Integer[np.ndarray, "M N"], final: Integer[np.ndarray, "M N"]) -> float:
    """Returns the share of the final choices that were already among the choices of an earlier checkpoint."""
    return float((final[:, :, None] == chosen[:, None, :]).any(-1).mean())


def co_activation(chosen: Integer[np.ndarray, "M N"], num_experts: int) -> Float[np.ndarray, "E E"]:
    """Returns, of the tokens that chose the row's expert, the share that also chose the column's; all 0 where N is 1."""
    member = np.zeros((len(chosen), num_experts))
    np.put_along_axis(member, chosen.astype(np.int64), 1.0, axis=1)
    together = member.T @ member
    of_each = np.maximum(np.diag(together), 1.0)[:, None]
    return (together - np.diag(np.diag(together))) / of_each


def joint_counts(a: Integer[np.ndarray, " M"], b: Integer[np.ndarray, " M"]) -> Float[np.ndarray, "A B"]:
    """Counts how often each value of `a` meets each of `b`."""
    counts = np.zeros((int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1))
    np.add.at(counts, (a, b), 1.0)
    return counts


def conditional(a: Integer[np.ndarray, " M"], b: Integer[np.ndarray, " M"], shape: tuple[int, int]) -> Float[np.ndarray, "A B"]:
    """Returns the distribution of `b` for every value of `a`; rows of values that do not occur are 0."""
    counts = np.zeros(shape)
    np.add.at(counts, (a, b), 1.0)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1.0)


def information(a: Integer[np.ndarray, " M"], b: Integer[np.ndarray, " M"]) -> float:
    """Returns the mutual information of two labels of the same tokens, in bits, of their counts as they are."""
    joint = joint_counts(a, b) / max(len(a), 1)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def specialisation(expert: Integer[np.ndarray, " M"], label: Integer[np.ndarray, " M"], seed: int = 0) -> float:
    """Returns what a token's label says about its expert, in bits, beyond what chance would say of so few tokens.

    Counts of few tokens always seem to say something: what they say with the experts shuffled is taken off.
    """
    random = np.random.default_rng(seed)
    chance = np.mean([information(random.permutation(expert), label) for _ in range(_SHUFFLES)])
    return max(information(expert, label) - float(chance), 0.0)


def predictability(known: Integer[np.ndarray, " M"], expert: Integer[np.ndarray, " M"], seed: int = 0) -> tuple[float, float]:
    """Returns how often a token's expert is guessed by what is known of it, and how often without, on tokens that were not counted.

    A guess is the most frequent expert among the other half of the tokens with the same known value (or among all of them).
    """
    order = np.random.default_rng(seed).permutation(len(expert))
    counted, tested = order[::2], order[1::2]
    shape = int(known.max(initial=0)) + 1, int(expert.max(initial=0)) + 1
    seen = conditional(known[counted], expert[counted], shape)
    usual = np.bincount(expert[counted], minlength=shape[1])
    guess = np.where(seen.any(1), seen.argmax(1), usual.argmax())
    return float((guess[known[tested]] == expert[tested]).mean()), float((usual.argmax() == expert[tested]).mean())
