"""Examples of tasks with heads: texts with a class or several, a number, a tag for each word, or a span of a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig, check
from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.config.heads import SEPARATOR, class_number
from flax_switch.config.ranges import shown
from flax_switch.data.batches import IGNORED
from flax_switch.data.examples import Example
from flax_switch.data.formats import Record
from flax_switch.data.pairs import Pairs, ragged
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.data.words import encode_context, encode_words

FieldReader = Callable[[Record, str | int, str, str], Any]  # (record, field, where, setting) -> its value


def check_example(example: Example, model: SwitchConfig, where: str) -> Example:
    """Returns an example whose references are what the model's head has; raises `ConfigError` that says where one is not."""
    if model.head == "classification":
        return example._replace(references=tuple(named(text, model.labels, where) for text in example.references))
    if model.head == "regression":
        for text in example.references:
            check(_is_number(text), f"{where}: the target of a regression must be a number; it is {shown(text)}.")
    if model.head == "question_answering":
        check(
            example.references[0] in example.context,
            f"{where}: the answer {shown(example.references[0])} does not stand in the context; mend the file.",
        )
    return example


def named(label: str, labels: Sequence[str], where: str) -> str:
    """Returns the name of a class that is given by its name or its number; raises `ConfigError` for what is neither."""
    if label not in labels and label.isdecimal() and len(label) < 10 and int(label) < len(labels):
        return labels[int(label)]
    return labels[class_number(label, labels, where)]


def tagged_example(record: Record, task: TaskConfig, model: SwitchConfig, where: str, value: FieldReader) -> Example | None:
    """Returns an example of words with tags, both given as lists or with spaces between them; None for one without words."""
    words, tags = (
        _listed(value(record, field, where, setting), where)
        for field, setting in ((task.inputs, "inputs"), (task.targets, "targets"))
    )
    if not words:
        return None
    check(
        len(words) == len(tags),
        f"{where}: there are {len(words)} words and {len(tags)} tags; each word has one. Mend the file.",
    )
    tags = [named(_renamed(tag, task), model.labels, where) for tag in tags]
    return Example(" ".join(words), (" ".join(tags),))


def labelled_example(record: Record, task: TaskConfig, model: SwitchConfig, where: str, value: FieldReader) -> Example | None:
    """Returns an example of a text with its classes, given as a list or with commas between them; None for one without a text."""
    text, given = (value(record, field, where, setting) for field, setting in ((task.inputs, "inputs"), (task.targets, "targets")))
    check(text is None or isinstance(text, str), f"{where}: field {task.inputs!r} must be text; it is {shown(text)}.")
    if not text or not text.strip():
        return None
    each = given if isinstance(given, list) else ("" if given is None else str(given)).split(SEPARATOR.strip())
    found = {named(_renamed(name, task), model.labels, where) for name in (str(one).strip() for one in each) if name}
    return Example(task.prefix + text, (SEPARATOR.join(label for label in model.labels if label in found),))


def _renamed(label: str, task: TaskConfig) -> str:
    """Returns the text that `data.labels` has for a number."""
    return task.labels[int(label)] if label.isdecimal() and int(label) < len(task.labels) else label


def _listed(value: Any, where: str) -> list[str]:
    parts = [str(part) for part in value] if isinstance(value, list) else str(value).split()
    bad = next((part for part in parts if part.split() != [part]), None)
    check(bad is None, f"{where}: the word {shown(bad)} is empty or has white space in it; mend the file.")
    return parts


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(np.float32(text))
    except ValueError:
        return False


class LabelledPairs(Pairs):
    """Inputs as token ids ended with EOS, and labels: whole numbers as they are, -100 where none counts."""

    def __init__(self, inputs: Iterable[Sequence[int]], labels: Iterable[Sequence[int]], *, inputs_length: int, eos_id: int):
        """Takes ids without EOS; what does not fit is cut off at the end."""
        rows = [np.asarray(row, np.int32) for row in labels]
        self._inputs, self.input_lengths, self.truncated_inputs = ragged(inputs, inputs_length, eos_id)
        self._targets = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self.target_lengths, self.truncated_targets = np.array([len(row) for row in rows], np.int64), 0
        self._index()


def encode_labelled(
    examples: Sequence[Example], vocabulary: Vocabulary, config: FinetuneDataConfig, model: SwitchConfig
) -> LabelledPairs:
    """Returns examples as ids and the labels that the model's head learns."""
    encoders = {"token_classification": _tags, "question_answering": _span, "multi_label_classification": _several}
    encode = encoders.get(model.head, _one)
    encoded = [encode(example, vocabulary, config.inputs_length, model) for example in examples]
    check(
        not encoded or any(label != IGNORED for _, labels in encoded for label in labels),
        f"no answer lies within data.inputs_length={config.inputs_length} tokens, question included; raise it.",
    )
    return LabelledPairs(
        (ids for ids, _ in encoded), (labels for _, labels in encoded), inputs_length=config.inputs_length, eos_id=vocabulary.eos_id
    )


def _one(example: Example, vocabulary: Vocabulary, length: int, model: SwitchConfig) -> tuple[list[int], list[int]]:
    """Returns the label of a text: its class, or the bits of its number."""
    text = example.references[0]
    label = int(np.float32(text).view(np.int32)) if model.head == "regression" else model.labels.index(text)
    return vocabulary.encode(example.inputs), [label]


def _several(example: Example, vocabulary: Vocabulary, length: int, model: SwitchConfig) -> tuple[list[int], list[int]]:
    """Returns 1 for each class that a text has, and 0 for the others."""
    found = example.references[0].split(SEPARATOR)
    return vocabulary.encode(example.inputs), [int(label in found) for label in model.labels]


def _tags(example: Example, vocabulary: Vocabulary, length: int, model: SwitchConfig) -> tuple[list[int], list[int]]:
    """Returns a label for each token that fits: at the first of each word its tag, -100 at others and at EOS."""
    encoded, labels = encode_words(example.inputs.split(), vocabulary), []
    for ids, tag in zip(encoded, example.references[0].split(), strict=True):
        labels += [model.labels.index(tag), *[IGNORED] * (len(ids) - 1)][: len(ids)]
    return [token for ids in encoded for token in ids], [*labels[: length - 1], IGNORED]


def _span(example: Example, vocabulary: Vocabulary, length: int, model: SwitchConfig) -> tuple[list[int], list[int]]:
    """Returns the first and last token of the first place in the context where the answer stands; -100 where it was cut off."""
    encoded = encode_context(example.inputs, example.context, vocabulary)
    start = example.context.index(example.references[0])
    found = encoded.tokens_of(start, start + len(example.references[0]))
    return encoded.ids, [IGNORED, IGNORED] if found is None or found[1] >= length - 1 else list(found)
