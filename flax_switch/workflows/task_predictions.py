"""Evaluation of tasks' heads on validation examples: the head's loss, what it says of each example, and scores of that."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.heads import SEPARATOR
from flax_switch.data.batches import pad_batch, pad_rows
from flax_switch.data.examples import Example
from flax_switch.data.tasks import PreparedTask, PreparedTasks, spread
from flax_switch.data.words import encode_context, encode_words
from flax_switch.parallel.mesh import batch_rows, shard_batch
from flax_switch.pretrained.tasks import span
from flax_switch.training.metrics import plain
from flax_switch.training.state import Run
from flax_switch.workflows.scores import score
from flax_switch.workflows.task_scores import class_scores, number_scores, retrieval_scores, set_scores, tag_scores

OUTSIDE = "O"  # what a word beyond data.inputs_length is taken for, where there is such a tag


def examined(
    run: Run, task: PreparedTask, eval_step: Callable[[Any, Any], dict[str, Any]], params: Any, count: int | None
) -> tuple[list[Example], list[np.ndarray], dict[str, Any]]:
    """Returns at most `count` validation examples, the head's outputs for each, and means: loss, and routers' metrics."""
    data = run.config.data
    chosen = spread(task.validation, count)
    outputs: list[np.ndarray] = []
    totals, routers, rows = {"cross_entropy": 0.0, "tokens": 0.0}, [], batch_rows(run.mesh, data.batch_size)
    for start in range(0, len(chosen), data.batch_size):
        ids = np.array(chosen[start : start + data.batch_size])
        examples = task.validation_pairs.examples(ids, np.zeros_like(ids))
        batch = pad_rows(pad_batch(examples, data.inputs_length, data.targets_length), data.batch_size)
        found = eval_step(params, shard_batch({name: array[rows] for name, array in batch.items()}, run.mesh))
        logits = np.asarray(found.pop("logits"))
        each = logits.reshape(data.batch_size, 2, -1) if run.config.model.head == "embedding" else logits
        outputs += list(each[: len(ids)])
        sums = plain(found)
        routers.append({name: np.asarray(value) for name, value in sums.items() if name.startswith("routers/")})
        totals = {name: total + sums[name] for name, total in totals.items()}
    means = {name: np.mean([one[name] for one in routers], axis=0).tolist() for name in routers[0]}
    return (
        [task.validation[i] for i in chosen],
        outputs,
        means | {"cross_entropy": totals["cross_entropy"] / max(totals["tokens"], 1.0)},
    )


def said(model: SwitchConfig, examples: Sequence[Example], outputs: Sequence[np.ndarray], vocabulary: Any) -> list[str]:
    """Returns what a head says of each example, as text: a class or several, a number, tags, a span, or the nearest text."""
    if model.head == "classification":
        return [model.labels[int(row.argmax())] for row in outputs]
    if model.head == "multi_label_classification":
        return [SEPARATOR.join(label for label, logit in zip(model.labels, row, strict=True) if logit > 0) for row in outputs]
    if model.head == "regression":
        return [repr(float(row[0])) for row in outputs]
    if model.head == "token_classification":
        return [" ".join(_tags(model, example, row, vocabulary)) for example, row in zip(examples, outputs, strict=True)]
    if model.head == "question_answering":
        contexts = [encode_context(e.inputs, e.context, vocabulary).characters for e in examples]
        rows = [row[: len(row) - 1] for row in outputs]  # the last place has EOS, or what was cut off
        each = zip(rows, contexts, examples, strict=True)
        return [span(row, characters, example.context).text for row, characters, example in each]
    texts, _, scores = similarities(examples, outputs)
    return [texts[int(row.argmax())] for row in scores]


def _tags(model: SwitchConfig, example: Example, logits: np.ndarray, vocabulary: Any) -> list[str]:
    firsts = np.cumsum([0, *map(len, encode_words(example.inputs.split(), vocabulary))])[:-1]
    beyond = OUTSIDE if OUTSIDE in model.labels else model.labels[0]
    best = logits.argmax(-1)
    return [model.labels[best[first]] if first < len(best) - 1 else beyond for first in firsts]


def similarities(examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> tuple[list[str], list[list[int]], np.ndarray]:
    """Returns all the examples' targets once, which of them are relevant to each example, and the cosines [N, M] with each."""
    place: dict[str, int] = {}
    for example in examples:
        place.setdefault(example.references[0], len(place))
    firsts = {place[example.references[0]]: output[1] for example, output in zip(examples, outputs, strict=True)}
    targets = np.stack([firsts[i] for i in range(len(place))])
    relevant = [sorted({place[text] for text in example.references if text in place}) for example in examples]
    return list(place), relevant, np.stack([output[0] for output in outputs]) @ targets.T


def task_score(
    metric: str, model: SwitchConfig, examples: Sequence[Example], outputs: Sequence[np.ndarray], texts: Sequence[str]
) -> dict[str, float]:
    """Returns the scores of one metric by name, of what was `said` of the examples."""
    first = [example.references[0] for example in examples]
    if model.head == "classification":
        predicted, wanted = (np.array([model.labels.index(text) for text in side]) for side in (texts, first))
        return {metric: class_scores(metric, predicted, wanted, len(model.labels))}
    if model.head == "multi_label_classification":
        return {
            metric: set_scores(metric, *([set(filter(None, text.split(SEPARATOR))) for text in side] for side in (texts, first)))
        }
    if model.head == "regression":
        return {metric: number_scores(metric, *(np.array(list(map(float, side))) for side in (texts, first)))}
    if model.head == "token_classification":
        return {metric: tag_scores(metric, *([text.split() for text in side] for side in (texts, first)))}
    if model.head == "question_answering":
        return score(metric, texts, [example.references for example in examples])
    _, relevant, scores = similarities(examples, outputs)
    return retrieval_scores(scores, relevant)


def evaluate_heads(
    run: Run, config: FinetuneConfig, prepared: PreparedTasks, eval_step: Callable[[Any, Any], dict[str, Any]], params: Any
) -> tuple[dict[str, Any], list[tuple[str, list[Example], list[str]]]]:
    """Returns metrics, with several tasks also of each, and of each task its name, examples and what was said of them."""
    means, by_task, predictions = [], [], []
    for task in prepared.tasks:
        if not task.validation:
            continue
        examples, outputs, mean = examined(run, task, eval_step, params, config.evaluation.max_examples)
        texts = said(config.model, examples, outputs, prepared.vocabulary)
        scores: dict[str, float] = {}
        for metric in config.metrics_of(task.config):
            scores |= task_score(metric, config.model, examples, outputs, texts)
        means.append(mean)
        by_task.append((task.config.name, scores))
        predictions.append((task.config.name, examples, texts))
    found = {name: np.mean([mean[name] for mean in means], axis=0).tolist() for name in means[0]}
    if len(prepared.tasks) > 1:
        found |= {f"{task}/{name}": value for task, scores in by_task for name, value in scores.items()}
    names = dict.fromkeys(name for _, scores in by_task for name in scores)
    return found | {name: float(np.mean([s[name] for _, s in by_task if name in s])) for name in names}, predictions
