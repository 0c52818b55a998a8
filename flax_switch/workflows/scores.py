"""Scores of generated texts against references, in per cent: sacreBLEU's and rouge-score's own, and SQuAD's.

BLEU and chrF are over the corpus; the others are means over examples, each against its best reference.
"""

import collections
import importlib.util
import re
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flax_switch.config import ConfigError
from flax_switch.config.finetuning import METRICS

References = Sequence[Sequence[str]]

_NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def require(metrics: Iterable[str]) -> None:
    """Raises `ConfigError` for a metric whose package is not installed."""
    for metric in metrics:
        package = _NEEDS.get(metric)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"The metric {metric!r} needs {package}: pip install 'flax_switch[eval]'.")


def score(metric: str, predictions: Sequence[str], references: References) -> dict[str, float]:
    """Returns the scores of one metric of `METRICS` by name, each from 0 to 100."""
    if metric in ("bleu", "chrf"):
        import sacrebleu

        function = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric]
        return {metric: function(list(predictions), _streams(references)).score}
    if metric == "rouge":
        return _rouge(predictions, references)
    each = {"exact_match": exact_match, "f1": token_f1, "accuracy": _same_text}[metric]
    return {metric: 100.0 * _mean_of_best(each, predictions, references)}


def _streams(references: References) -> list[list[str | None]]:
    """Returns sacreBLEU's form: the first reference of every example, then the second, ...; None where an example has fewer."""
    most = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]


def _rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Returns means of F measures by rouge-score, without stemming, as T5 reports them."""
    from rouge_score.rouge_scorer import RougeScorer

    names = METRICS["rouge"]
    scorer = RougeScorer(list(names))
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
