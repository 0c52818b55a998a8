"""Scores of tasks against scipy, against their definitions, and on cases counted by hand."""

import numpy as np
import pytest
from scipy import stats

from flax_switch.workflows.task_scores import chunks, class_scores, number_scores, retrieval_scores, set_scores, tag_scores


@pytest.mark.parametrize("seed", range(3))
def test_two_classes_by_the_counts_of_their_definitions(seed):
    rng = np.random.default_rng(seed)
    predicted, wanted = rng.integers(0, 2, (2, 40))
    tp, tn = ((predicted == c) & (wanted == c) for c in (1, 0))
    fp, fn = (predicted == 1) & (wanted == 0), (predicted == 0) & (wanted == 1)
    tp, tn, fp, fn = (float(x.sum()) for x in (tp, tn, fp, fn))
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert class_scores("accuracy", predicted, wanted, 2) == pytest.approx(100 * (tp + tn) / 40)
    assert class_scores("f1", predicted, wanted, 2) == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    assert class_scores("matthews", predicted, wanted, 2) == pytest.approx(100 * matthews)


def test_matthews_of_many_classes_is_the_correlation_of_their_indicators():
    predicted, wanted = np.random.default_rng(0).integers(0, 4, (2, 60))
    a, b = (np.eye(4)[side] - np.eye(4)[side].mean(0) for side in (predicted, wanted))
    expected = 100 * (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert class_scores("matthews", predicted, wanted, 4) == pytest.approx(expected)
    assert class_scores("matthews", np.zeros(5, int), np.arange(5) % 2, 2) == 0.0  # one class alone says nothing
    assert class_scores("f1", np.array([0, 0, 2]), np.array([0, 2, 2]), 4) == pytest.approx(100 * 2 / 3)  # of the classes there


def test_several_classes_a_text_are_counted_by_hand():
    predicted, wanted = [{"a", "b"}, {"c"}, set()], [{"a"}, {"c"}, {"b", "c"}]
    assert set_scores("accuracy", predicted, wanted) == pytest.approx(100 / 3)
    assert set_scores("f1", predicted, wanted) == pytest.approx(100 * 2 * 2 / (3 + 4))  # 2 right of 3 said and 4 that there are
    assert set_scores("f1", [set()], [set()]) == 100.0


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30)).round(1)  # with ties
    assert number_scores("pearson", a, b) == pytest.approx(100 * stats.pearsonr(a, b)[0])
    assert number_scores("spearman", a, b) == pytest.approx(100 * stats.spearmanr(a, b)[0])
    assert number_scores("mse", a, b) == pytest.approx(np.mean((a - b) ** 2))
    assert number_scores("pearson", a, np.ones(30)) == 0.0


@pytest.mark.parametrize(
    "tags, spans",
    [
        ("O O", set()),
        ("B-P I-P O B-P", {(0, 2, "P"), (3, 4, "P")}),
        ("B-P B-P I-Q", {(0, 1, "P"), (1, 2, "P"), (2, 3, "Q")}),
        ("I-P I-P", {(0, 2, "P")}),
        ("verb verb O noun", {(0, 2, "verb"), (3, 4, "noun")}),
    ],
)
def test_spans_of_tags(tags, spans):
    assert chunks(tags.split()) == spans


def test_spans_are_scored_over_all_texts_and_words_one_by_one():
    made, true = [["B-P", "I-P"], ["B-P", "O"]], [["B-P", "I-P"], ["O", "B-P"]]
    assert tag_scores("span_f1", made, true) == 50.0 and tag_scores("accuracy", made, true) == 50.0


def test_what_is_among_the_nearest_is_recalled_and_ties_count_against_it():
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    found = retrieval_scores(scores, [[0], [1], [1, 2]], at=(1, 2))
    assert found == {"recall_at_1": pytest.approx(100 / 3), "recall_at_2": 100.0}
