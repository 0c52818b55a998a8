"""The head of a task, as transformers' `config.json` describes it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_switch.config.base import check
from flax_switch.config.heads import HEADS, head_of
from flax_switch.config.model import SwitchConfig
from flax_switch.config.ranges import shown


def head_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the head that a `config.json` names by its class, and its labels; nothing for a class that has none."""
    named = (values.get("architectures") or [""])[0]
    heads = [name for name, head in HEADS.items() if isinstance(named, str) and named.endswith(head.huggingface)]
    heads = [name for name in heads if HEADS[name].targets_length is not None or HEADS[name].labelled]
    if not heads:
        return {}
    fields: dict[str, Any] = {"classifier_dropout": values.get("classifier_dropout", 0.0)}
    labels, count, problem = values.get("id2label"), values.get("num_labels"), values.get("problem_type")
    if labels is None:
        labels = {i: f"LABEL_{i}" for i in range(2 if count is None else min(count, 10_000))}
    labels = {str(number): label for number, label in labels.items()}
    names = [labels.get(str(i)) for i in range(len(labels))]
    check(
        all(isinstance(name, str) for name in names),
        f"config.json has id2label={shown(labels)}; expected a name for each number from 0 on.",
    )
    if heads[0] == "question_answering":
        check(len(names) == 2, f"config.json has {len(names)} labels; a head for spans has 2 outputs, their start and their end.")
        return {**fields, "head": heads[0]}
    if heads[0] != "classification":
        return {**fields, "head": heads[0], "labels": tuple(names)}
    if problem == "regression" or (problem is None and len(names) == 1):
        check(len(names) == 1, f"config.json asks for the regression of {len(names)} numbers; a head here gives one.")
        return {**fields, "head": "regression"}
    check(
        problem in (None, "single_label_classification"),
        f"config.json has problem_type={shown(problem)}; known are 'regression' and 'single_label_classification', one class for "
        "each text.",
    )
    return {**fields, "head": "classification", "labels": tuple(names)}


def head_values(config: SwitchConfig) -> dict[str, Any]:
    """Returns what a `config.json` says of a task's head."""
    head = head_of(config)
    if not head.labelled and head.targets_length is None:
        return {}
    labels = config.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    values: dict[str, Any] = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "classifier_dropout": config.classifier_dropout,
    }
    problems = {"regression": "regression", "classification": "single_label_classification"}
    return {**values, "problem_type": problems[config.head]} if config.head in problems else values
