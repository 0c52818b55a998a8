"""Scores of generated texts against references, in per cent: sacreBLEU's and rouge-score's own, and SQuAD's.

BLEU and chrF are over the corpus; the others are means over examples, each against its best reference.
"""

import collections
import importlib.util
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flax_switch.config import ConfigError
from flax_switch.config.finetuning import METRICS
from flax_switch.workflows.words import RougeWords, bleu_tokenizer, resolve, warn_of_empty

References = Sequence[Sequence[str]]

_NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def require(metrics: Iterable[str]) -> None:
    """Raises `ConfigError` for a metric whose package is not installed."""
    for metric in metrics:
        package = _NEEDS.get(metric)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"The metric {metric!r} needs {package}: pip install 'flax_switch[eval]'.")


def score(metric: str, predictions: Sequence[str], references: References, tokenizer: str = "auto") -> dict[str, float]:
    """Returns the scores of one metric of `METRICS` by name, each from 0 to 100.

    tokenizer: what counts as a word in ROUGE and BLEU, one of `SCORE_TOKENIZERS`.
    """
    if metric == "chrf":
        import sacrebleu

        return {metric: sacrebleu.corpus_chrf(list(predictions), _streams(references)).score}
    if metric == "bleu":
        import sacrebleu

        words = bleu_tokenizer(resolve(tokenizer, references))
        return {metric: sacrebleu.corpus_bleu(list(predictions), _streams(references), tokenize=words).score}
    if metric == "rouge":
        return _rouge(predictions, references, resolve(tokenizer, references))
    each = {"exact_match": exact_match, "f1": token_f1, "accuracy": _same_text}[metric]
    return {metric: 100.0 * _mean_of_best(each, predictions, references)}


def _streams(references: References) -> Any:
    """sacreBLEU's form: the first reference of every example, then the second, ...; None where an example has fewer."""
    most = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]


def _rouge(predictions: Sequence[str], references: References, tokenizer: str) -> dict[str, float]:
    """Means of F measures by rouge-score, without stemming, as T5 reports them."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    names = METRICS["rouge"]
    words = DefaultTokenizer(use_stemmer=False) if tokenizer == "latin" else RougeWords(tokenizer)
    warn_of_empty(((text, words.tokenize(text)) for texts in references for text in texts), "ROUGE", tokenizer)
    scorer = RougeScorer(list(names), tokenizer=words)
    scores = [scorer.score_multi(list(refs), text) for text, refs in zip(predictions, references, strict=True)]
    return {name: 100.0 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


def _mean_of_best(each: Callable[[str, str], float], predictions: Sequence[str], references: References) -> float:
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([max(each(text, reference) for reference in refs) for text, refs in pairs]))


def normalized_answer(text: str) -> str:
    """Returns a text as SQuAD compares it: lower case, without punctuation, articles and extra spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 where two answers are the same after SQuAD's normalisation."""
    return float(normalized_answer(prediction) == normalized_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of the words two answers share, after SQuAD's normalisation."""
    words, expected = normalized_answer(prediction).split(), normalized_answer(reference).split()
    if not words or not expected:
        return float(words == expected)
    common = sum((collections.Counter(words) & collections.Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _same_text(prediction: str, reference: str) -> float:
    return float(prediction.strip() == reference.strip())
