"""Scores of classes, numbers, tags and embeddings; all but the squared error in per cent.

Correlations are undefined where one side has a single value; they count as 0 then.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Chunk = tuple[int, int, str]  # first word, the word after the last, and what the span is


def class_scores(metric: str, predicted: Int[np.ndarray, " N"], wanted: Int[np.ndarray, " N"], classes: int) -> float:
    """Returns accuracy, F1 or Matthews' correlation of classes by number.

    F1 of two classes is that of the second; of more the mean over the classes that were predicted or wanted.
    """
    table = np.zeros((classes, classes))
    np.add.at(table, (wanted, predicted), 1)
    hits, of_wanted, of_predicted = np.diag(table), table.sum(1), table.sum(0)
    if metric == "accuracy":
        return 100.0 * float(hits.sum() / table.sum())
    if metric == "f1":
        there = of_wanted + of_predicted > 0
        each = 2 * hits / np.maximum(of_wanted + of_predicted, 1)
        return 100.0 * float(each[1] if classes == 2 else each[there].mean())
    total = table.sum()
    covariance = hits.sum() * total - of_wanted @ of_predicted
    spread = np.sqrt((total**2 - of_wanted @ of_wanted) * (total**2 - of_predicted @ of_predicted))
    return 100.0 * float(covariance / spread) if spread else 0.0


def set_scores(metric: str, predicted: Sequence[set[str]], wanted: Sequence[set[str]]) -> float:
    """Returns the share of texts with exactly the right classes, or F1 of all texts' classes together (micro)."""
    if metric == "accuracy":
        return 100.0 * float(np.mean([a == b for a, b in zip(predicted, wanted, strict=True)]))
    return _f1(*({(i, label) for i, found in enumerate(side) for label in found} for side in (predicted, wanted)))


def _f1(made: set, true: set) -> float:
    return 100.0 * (2 * len(made & true) / (len(made) + len(true)) if made or true else 1.0)


def number_scores(metric: str, predicted: Float[np.ndarray, " N"], wanted: Float[np.ndarray, " N"]) -> float:
    """Returns Pearson's or Spearman's correlation, or the mean squared error, which is not in per cent."""
    if metric == "mse":
        return float(np.square(predicted - wanted).mean())
    sides = [ranks(side) if metric == "spearman" else side.astype(np.float64) for side in (predicted, wanted)]
    a, b = (side - side.mean() for side in sides)
    spread = np.sqrt((a @ a) * (b @ b))
    return 100.0 * float(a @ b / spread) if spread else 0.0


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns the ranks of values from 1 on; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def chunks(tags: Sequence[str]) -> set[Chunk]:
    """Returns the spans of tags such as B-PER, I-PER, O: one begins at B, at another kind, and at I after O.

    Tags without B- or I- make a span of each run of equal ones; O is no span.
    """
    found: set[Chunk] = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-") if tag[:2] in ("B-", "I-") else ("I", "", "" if tag == "O" else tag)
        if kind and (mark == "B" or name != kind):
            found.add((start, i, kind))
            kind = ""
        if name and not kind:
            start, kind = i, name
    return found


def tag_scores(metric: str, predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Returns the share of words with the right tag, or F1 of spans over all texts together."""
    if metric == "accuracy":
        right = [a == b for tags, true in zip(predicted, wanted, strict=True) for a, b in zip(tags, true, strict=True)]
        return 100.0 * float(np.mean(right))
    made, true = ({(i, *chunk) for i, tags in enumerate(side) for chunk in chunks(tags)} for side in (predicted, wanted))
    return _f1(made, true)


def retrieval_scores(
    scores: Float[np.ndarray, "N M"], relevant: Sequence[Sequence[int]], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns for each k the share of rows that have one of their relevant columns among the k of the largest scores.

    Among equal scores the relevant one counts as the last.
    """
    best = np.array([max(row[list(columns)]) for row, columns in zip(scores, relevant, strict=True)])
    others = [np.delete(row, list(columns)) for row, columns in zip(scores, relevant, strict=True)]
    before = np.array([(row >= value).sum() for row, value in zip(others, best, strict=True)])
    return {f"recall_at_{k}": 100.0 * float((before < k).mean()) for k in at}
