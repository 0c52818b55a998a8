"""Tasks of fine-tuning: from files to examples of texts, to token ids, to the batches of training and validation.

prepared = prepare_tasks(config.data, vocabulary)
batches = prepared.train_iterator()               # endless: the mixture, shuffled, resumable
prepared.tasks[0].validation                      # texts with their references, for evaluation by generation
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Integer

from flax_switch.config import SwitchConfig, check
from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.config.heads import has_labels
from flax_switch.data.batches import Batch
from flax_switch.data.cache import is_heldout
from flax_switch.data.examples import Example
from flax_switch.data.formats import Record
from flax_switch.data.labelled import check_example, encode_labelled, labelled_example, tagged_example
from flax_switch.data.pairs import Pairs
from flax_switch.data.task_files import task_records
from flax_switch.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from flax_switch.data.loader import TrainIterator

_TEMPLATE_FIELD = re.compile(r"{([^{}]+)}")


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """One task's examples."""

    config: TaskConfig
    train: Pairs | None  # None where only evaluation is meant
    validation: tuple[Example, ...]
    validation_pairs: Pairs

    def describe(self, config: FinetuneDataConfig) -> dict[str, Any]:
        """Returns numbers of examples, and which share of them was cut to the maximal lengths."""
        kinds = {"train": self.train, "validation": self.validation_pairs}
        lengths = {"inputs_length": config.inputs_length, "targets_length": config.targets_length}
        return {"task": self.config.name, **lengths} | {
            kind: {
                "examples": pairs.num_examples,
                "truncated_inputs": pairs.truncated_inputs / max(pairs.num_examples, 1),
                "truncated_targets": pairs.truncated_targets / max(pairs.num_examples, 1),
            }
            for kind, pairs in kinds.items()
            if pairs is not None
        }


@dataclasses.dataclass(frozen=True)
class PreparedTasks:
    """Everything the batches of a fine-tuning run are made of. `rates` are the tasks' shares of the training examples."""

    config: FinetuneDataConfig
    vocabulary: Vocabulary
    tasks: tuple[PreparedTask, ...]
    rates: tuple[Fraction, ...]

    def train_iterator(self, rows: Integer[np.ndarray, " rows"] | None = None) -> TrainIterator:
        """Returns endless training batches, or of each the given rows: those that this process's devices hold."""
        from flax_switch.data.mixtures import mixture_iterator

        tasks = [task.train for task in self.tasks if task.train is not None]
        return mixture_iterator(tasks, self.rates, self.config, rows=rows)

    def validation_batches(self, count: int | None = None, rows: Integer[np.ndarray, " rows"] | None = None) -> Iterator[Batch]:
        """Returns the first `count` (or all) validation batches, or the given rows of each: always the same, an example a row."""
        from flax_switch.data.loader import BatchMaker, finite_batches

        pairs = Pairs.joined([task.validation_pairs for task in self.tasks])
        return finite_batches(BatchMaker.of(pairs, self.config), self.config.batch_size, count, seed=0, rows=rows)

    @property
    def num_validation(self) -> int:
        """Validation examples of all tasks."""
        return sum(len(task.validation) for task in self.tasks)

    @property
    def fingerprint(self) -> str:
        """Changes with any token of the examples, and with their texts and references."""
        digest = hashlib.blake2b(digest_size=10)
        for task in self.tasks:
            pairs = "" if task.train is None else task.train.fingerprint
            digest.update(f"{task.config.name} {pairs} {task.validation_pairs.fingerprint} {task.validation!r}".encode())
        return digest.hexdigest()

    def describe(self) -> list[dict[str, Any]]:
        """Returns `PreparedTask.describe` of every task, with its rate."""
        rates = self.rates or (None,) * len(self.tasks)
        return [
            task.describe(self.config) | ({} if rate is None else {"rate": float(rate)})
            for task, rate in zip(self.tasks, rates, strict=True)
        ]


def prepare_tasks(
    config: FinetuneDataConfig,
    vocabulary: Vocabulary,
    *,
    train: bool = True,
    say: Callable[[str], None] = lambda text: None,
    model: SwitchConfig | None = None,
) -> PreparedTasks:
    """Reads and tokenises every task's files.

    Args:
      train: False reads validation examples alone.
      model: what the examples are for, where its head has labels; None: texts with texts as targets.
      say: is told the numbers of examples and the shares that were cut.

    Raises:
      ConfigError: for files, fields or texts that are missing, and for tasks without a training (or, with train=False, a
        validation) example.
    """
    tasks = []
    for task in config.mixture:
        training, validation = read_task(task, config, train=train, model=model)
        encoded = [_encode(examples, vocabulary, config, model) for examples in (training, validation)]
        tasks.append(PreparedTask(task, encoded[0] if train else None, tuple(validation), encoded[1]))
        say(summary(tasks[-1].describe(config)))
    rates: Sequence[Fraction] = ()
    if train:
        from flax_switch.data.mixtures import mixing_rates

        rates = mixing_rates(config, [task.train.num_examples for task in tasks if task.train is not None])
        if len(tasks) > 1:
            shares = (f"{task.config.name} {100 * float(rate):.1f} %" for task, rate in zip(tasks, rates, strict=True))
            say(f"Mixture of examples: {', '.join(shares)}.")
    return PreparedTasks(config, vocabulary, tuple(tasks), tuple(rates))


def read_task(
    task: TaskConfig, config: FinetuneDataConfig, *, train: bool = True, model: SwitchConfig | None = None
) -> tuple[list[Example], list[Example]]:
    """Returns (training examples, validation examples) of one task, in the order of its files."""
    own = f" of task {task.name!r}" if config.tasks else ""
    settings = {split: f"data.{split}{own}" for split in ("train", "validation")}
    training: list[Example] = []
    validation: list[Example] = []
    check(
        task.train is not None or (not train and task.validation is not None),
        f"Say where the examples are: {settings['train']}=FILE" + ("." if train else f", or {settings['validation']}=FILE."),
    )
    if task.validation is not None:
        validation = _read(task, task.validation, "validation", settings["validation"], config.skip_empty, model)
        check(bool(validation), f"{settings['validation']}: {task.validation} holds no example.")
        if train and task.train is not None:
            training = _read(task, task.train, "train", settings["train"], config.skip_empty, model)
    elif task.train is not None:
        for example in _read(task, task.train, "train", settings["train"], config.skip_empty, model):
            (validation if is_heldout(example.inputs, config.validation_fraction) else training).append(example)
        check(
            bool(validation) or config.validation_fraction == 0,
            f"{settings['train']}: no example fell into the validation share of {config.validation_fraction:.1%}; raise "
            f"data.validation_fraction, name {settings['validation']}, or set data.validation_fraction=0 to do without.",
        )
    check(bool(training) or not train, f"{settings['train']}: {task.train} holds no example to train on.")
    return training, validation


_LISTED = {"token_classification": tagged_example, "multi_label_classification": labelled_example}  # targets are lists


def _read(
    task: TaskConfig, source: str | tuple[str, ...], split: str, setting: str, skip_empty: bool, model: SwitchConfig | None
) -> list[Example]:
    model = model if model is not None and has_labels(model) else None
    examples = []
    for record, where in task_records(source, task, split, setting):
        if model is not None and model.head in _LISTED:
            listed = _LISTED[model.head](record, task, model, where, _value)
            check(listed is not None or skip_empty, f"{where}: the inputs are empty; mend the file, or set data.skip_empty=true.")
            examples += [] if listed is None else [listed]
            continue
        (inputs,), references = (
            _texts(record, task.inputs, task, where, "inputs"),
            _texts(record, task.targets, task, where, "targets"),
        )
        both = (("inputs", [inputs]), ("targets", references))
        empty = [name for name, texts in both if not texts or not all(t.strip() for t in texts)]
        if empty and skip_empty:
            continue
        check(
            references,
            f"{where}: field {task.targets!r} is an empty list; mend the file, or set data.skip_empty=true.",
        )
        check(not empty, f"{where}: the {' and '.join(empty)} are empty; mend the file, or set data.skip_empty=true.")
        context = "" if task.context is None else _texts(record, task.context, task, where, "context")[0]
        example = Example(task.prefix + inputs, tuple(references), context)
        examples.append(example if model is None else check_example(example, model, where))
    return examples


def _texts(record: Record, field: str | int, task: TaskConfig, where: str, setting: str) -> list[str]:
    """Returns the texts of a field: one, or of targets that are a list, several."""
    if isinstance(field, str) and field not in record and "{" in field:
        return [_TEMPLATE_FIELD.sub(lambda match: _texts(record, match[1], task, where, setting)[0], field)]
    value = _value(record, field, where, setting)
    values = value if isinstance(value, list) and setting == "targets" else [value]
    return [_text(v, field, task.labels if setting == "targets" else (), where) for v in values]


def _value(record: Record, field: str | int, where: str, setting: str) -> Any:
    """Returns a record's field, or with dots in its name a field of a field."""
    if field in record:
        return record[field]
    value: Any = record
    for part in str(field).split("."):
        fields = ", ".join(map(str, value)) if isinstance(value, dict) else ""
        check(
            isinstance(value, dict) and part in value,
            f"{where}: there is no field {field!r}; the fields are: {fields or 'none'}. Set data.{setting} to one of them.",
        )
        value = value[part]
    return value


def _text(value: Any, field: str | int, labels: tuple[str, ...], where: str) -> str:
    if labels:
        check(
            str(value).isdecimal() and len(str(value)) < 10 and int(value) < len(labels),
            f"{where}: field {field!r} must be a number below {len(labels)}, as data.labels names so many; it is {value!r}.",
        )
        return labels[int(value)]
    if value is None or (isinstance(value, float) and math.isnan(value)):  # how tables write that a value is missing
        return ""
    check(isinstance(value, str | int | float), f"{where}: field {field!r} must be text; it is a {type(value).__name__}.")
    return str(value)


def _encode(examples: Sequence[Example], vocabulary: Vocabulary, config: FinetuneDataConfig, model: SwitchConfig | None) -> Pairs:
    if model is not None and has_labels(model):
        return encode_labelled(examples, vocabulary, config, model)
    inputs, targets = [e.inputs for e in examples], [e.references[0] for e in examples]
    return Pairs.encode(inputs, targets, vocabulary, config)


def summary(description: dict[str, Any]) -> str:
    """Returns a task's numbers in a sentence."""
    parts = []
    for kind, name in (("train", "training"), ("validation", "validation")):
        if kind in description:
            numbers = description[kind]
            shares = {what: 100 * numbers[f"truncated_{what}"] for what in ("inputs", "targets")}
            shortened = ", ".join(f"{share:.1f} % of {what}" for what, share in shares.items())
            shortened = f" (too long and shortened: {shortened})" if any(shares.values()) else ""
            parts.append(f"{numbers['examples']:,} {name} examples{shortened}")
    lengths = f"{description['inputs_length']} and {description['targets_length']}"
    return f"{description['task']}: {'; '.join(parts)}; inputs and targets of at most {lengths} tokens."


def spread(examples: Sequence[Any], count: int | None) -> list[int]:
    """Returns indices of at most `count` examples, spread evenly."""
    if count is None or count >= len(examples):
        return list(range(len(examples)))
    return np.linspace(0, len(examples) - 1, count).round().astype(int).tolist()
