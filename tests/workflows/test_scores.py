"""Scores are those of sacrebleu and rouge-score themselves, and SQuAD's by its definition."""

import importlib.util

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from flax_switch.config import ConfigError
from flax_switch.workflows import scores, words
from flax_switch.workflows.scores import score

PREDICTIONS = ["the cat sat on the mat.", "and slept.\nA dog barked at night,", "nothing in common"]
REFERENCES = [("the cat sat on a mat.",), ("The dog barked at night,\nthen slept.", "a dog barked"), ("quite different words",)]


def test_bleu_and_chrf_equal_sacrebleu():
    streams = [[r[0] for r in REFERENCES], [None, REFERENCES[1][1], None]]
    assert scores.score("bleu", PREDICTIONS, REFERENCES) == {"bleu": sacrebleu.corpus_bleu(PREDICTIONS, streams).score}
    assert scores.score("chrf", PREDICTIONS, REFERENCES) == {"chrf": sacrebleu.corpus_chrf(PREDICTIONS, streams).score}
    single = [r[:1] for r in REFERENCES]
    assert scores.score("bleu", PREDICTIONS, single)["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, streams[:1]).score > 5


def test_rouge_equals_the_mean_of_rouge_scores_own_f_measures():
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names)
    expected = [scorer.score_multi(refs, text) for text, refs in zip(PREDICTIONS, REFERENCES, strict=True)]
    found = scores.score("rouge", PREDICTIONS, REFERENCES)
    assert list(found) == names
    for name, value in found.items():
        assert value == pytest.approx(100 * sum(s[name].fmeasure for s in expected) / 3, abs=1e-12)
    assert found["rougeL"] != found["rougeLsum"]


@pytest.mark.parametrize(
    ("prediction", "reference", "same", "f1"),
    [
        ("The Eiffel-Tower!", "eiffeltower", 1, 1.0),
        ("an apple a day", "Apple, day", 1, 1.0),
        ("in Paris", "Paris", 0, 2 / 3),
        ("red red blue", "red green", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("", "the", 1, 1.0),
        ("", "word", 0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(prediction, reference, same, f1):
    assert scores.exact_match(prediction, reference) == same
    assert scores.token_f1(prediction, reference) == pytest.approx(f1)


def test_answers_count_against_their_best_reference_and_labels_must_be_exact():
    assert scores.score("exact_match", ["Paris", "Rome"], [("London", "paris"), ("Oslo",)]) == {"exact_match": 50.0}
    assert scores.score("f1", ["in Paris"], [("x", "Paris")])["f1"] == pytest.approx(200 / 3)
    assert scores.score("accuracy", ["positive", "Negative"], [("positive",), ("negative",)]) == {"accuracy": 50.0}
    assert scores.score("accuracy", [" yes", "no"], [("yes\n",), ("no ",)]) == {"accuracy": 100.0}  # but for spaces around


def test_a_metric_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else True)
    scores.require(("bleu", "accuracy"))
    with pytest.raises(ConfigError, match=r"'rouge' needs rouge_score: pip install 'flax_switch\[eval\]'"):
        scores.require(("bleu", "rouge"))


# A sentence and its first words in scripts with and without blanks, and in the Latin alphabet with accents.
SCRIPTS = {
    "latin": ("der kleine Fuchs läuft über die Straße", "der kleine Fuchs läuft"),
    "unicode": ("маленькая лиса бежит через большую дорогу домой", "маленькая лиса бежит через большую"),
    "characters": ("小さな狐が道を走って渡ります", "小さな狐が道を走って"),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_words_of_every_script_count(kind, caplog):
    text, beginning = SCRIPTS[kind]
    assert words.resolve("auto", [[text]]) == kind
    for metric in ("rouge", "bleu"):
        perfect = score(metric, [text], [[text]])
        assert all(value == pytest.approx(100.0) for value in perfect.values()), metric
        part = score(metric, [beginning], [[text]])
        assert all(0 < value < 100 for value in part.values()), metric
        nothing = score(metric, ["42 42 42"], [[text]])
        assert all(value < 5 for value in nothing.values()), metric
    assert not caplog.records


def test_the_signs_of_vowels_are_part_of_a_word():
    same, other = "\u0915\u0940 \u0939\u093f\u0928", "\u0915\u093e \u0939\u0941\u0928"  # the same consonants with other vowels
    assert words.RougeWords("unicode").tokenize(same) == same.split()
    assert score("rouge", [same], [[same]])["rouge1"] == pytest.approx(100.0)
    assert score("rouge", [same], [[other]])["rouge1"] == 0.0


def test_a_reference_without_a_word_is_warned_of(caplog):
    score("rouge", ["маленькая лиса"], [["маленькая лиса"]], tokenizer="latin")
    assert "1 references have no word under evaluation.tokenizer='latin'" in caplog.text


def test_plain_latin_text_is_scored_as_rouge_score_and_sacrebleu_do():
    texts, references = ["the cat sat on the mat_1", "a dog"], [["The cat, sat on a mat_1!"], ["the dog ran"]]
    theirs = rouge_scorer.RougeScorer(["rouge1"])
    expected = 100 * np.mean([theirs.score(r[0], t)["rouge1"].fmeasure for t, r in zip(texts, references, strict=True)])
    assert score("rouge", texts, references)["rouge1"] == pytest.approx(expected)
    assert score("rouge", texts, references, tokenizer="unicode")["rouge1"] == pytest.approx(expected)
    assert score("bleu", texts, references)["bleu"] == sacrebleu.corpus_bleu(texts, [[r[0] for r in references]]).score
