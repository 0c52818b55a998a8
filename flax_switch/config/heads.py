"""What models end in: the language model's head, or one for a task of understanding, and what its outputs are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax_switch.config.base import check, one_of
from flax_switch.config.ranges import shown

if TYPE_CHECKING:
    from flax_switch.config.model import SwitchConfig

LANGUAGE_MODEL = "language_model"
SEPARATOR = ", "  # between the labels of a text that has several


@dataclasses.dataclass(frozen=True)
class Head:
    """What a kind of head reads, how many outputs it has, and the end of the names of transformers' classes that have it."""

    huggingface: str
    reads_decoder: bool = True  # its states; else the encoder's, and there is no decoder
    labelled: bool = False  # an output for each of the config's labels
    outputs: int = 0  # of one without labels
    targets_length: int | None = None  # columns of a batch's labels; None: as many as data.targets_length says
    targets_per_label: bool = False  # as many columns as there are labels


HEADS = {
    LANGUAGE_MODEL: Head("ForConditionalGeneration"),
    "classification": Head("ForSequenceClassification", labelled=True, targets_length=1),
    "multi_label_classification": Head("ForSequenceClassification", labelled=True, targets_per_label=True),
    "regression": Head("ForSequenceClassification", outputs=1, targets_length=1),
    "token_classification": Head("ForTokenClassification", reads_decoder=False, labelled=True),
    "question_answering": Head("ForQuestionAnswering", outputs=2, targets_length=2),
    "embedding": Head("EncoderModel", reads_decoder=False),
}


def has_labels(config: SwitchConfig) -> bool:
    """Returns whether a head learns labels: classes, numbers, or places in the inputs; others learn texts."""
    return HEADS[config.head].labelled or HEADS[config.head].targets_length is not None


def head_of(config: SwitchConfig) -> Head:
    """Returns what the head of a model is like."""
    return HEADS[config.head]


def targets_length(config: SwitchConfig) -> int | None:
    """Returns how many columns the labels of a batch have; None: as many as data.targets_length says."""
    return len(config.labels) if head_of(config).targets_per_label else head_of(config).targets_length


def num_outputs(config: SwitchConfig) -> int:
    """Returns how many outputs the head of a model has: one for each label where it has labels."""
    return len(config.labels) if head_of(config).labelled else head_of(config).outputs


def head_shapes(config: SwitchConfig) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of a task's head."""
    D, outputs = config.d_model, num_outputs(config)
    classes = {"classification_head/dense": D, "classification_head/out_proj": outputs}
    layers: dict[str, dict[str, int]] = {
        "classification": classes,
        "multi_label_classification": classes,
        "regression": classes,
        "token_classification": {"classifier": outputs},
        "question_answering": {"qa_outputs": outputs},
    }
    found = layers.get(config.head, {})
    return {f"{name}/{part}": (D, n) if part == "kernel" else (n,) for name, n in found.items() for part in ("kernel", "bias")}


def check_head(config: SwitchConfig) -> None:
    """Raises `ConfigError` for a head that there is not or that the model cannot have, and for labels that do not suit it."""
    one_of("head", config.head, tuple(HEADS))
    check(
        config.head == LANGUAGE_MODEL or not config.decoder_only,
        f"head={config.head!r} reads an encoder, or a decoder beside one; with architecture='decoder_only' set "
        f"head={LANGUAGE_MODEL!r}.",
    )
    labels = config.labels
    if not head_of(config).labelled:
        check(not labels, f"head={config.head!r} has no labels; leave labels={shown(labels)} out.")
        return
    check(
        len(labels) >= 2,
        f"head={config.head!r} needs the names of its classes, two or more; labels is {shown(labels)}. Set labels, such as "
        "('negative', 'positive').",
    )
    twice = next((label for label in labels if labels.count(label) > 1), None)
    check(twice is None, f"labels names {twice!r} twice; each class needs a name of its own.")
    listed = next((label for label in labels if head_of(config).targets_per_label and SEPARATOR.strip() in label), None)
    check(listed is None, f"labels names {listed!r}; with head={config.head!r} several are written with commas between them.")


def head_changes(config: SwitchConfig, changes: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Returns the head and labels that a checkpoint is to be opened with, of changes to its config; empty where they stay.

    Raises `ConfigError` where the checkpoint's own head would be lost, or have other classes than it was trained for.
    """
    head, labels = changes.get("head", config.head), changes.get("labels", config.labels)
    one_of("head", head, tuple(HEADS))
    check(
        isinstance(labels, Sequence) and not isinstance(labels, str) and all(isinstance(label, str) for label in labels),
        f"labels must be a list of names, such as ('negative', 'positive'); it is {shown(labels)}.",
    )
    labels = tuple(labels)
    if (head, labels) == (config.head, config.labels):
        return {}
    if config.head in (LANGUAGE_MODEL, "embedding") or head == "embedding":
        return {"head": head, "labels": labels if "labels" in changes or head == config.head else ()}
    check(
        head == config.head,
        f"{source} has a head for {config.head}, which head={head!r} would throw away. Leave head out to open it as it is, or open "
        f"the checkpoint that it was made of.",
    )
    check(
        len(labels) == len(config.labels),
        f"{source} has a head of {len(config.labels)} classes ({', '.join(config.labels)}); labels names {len(labels)}: "
        f"{', '.join(labels)}. Leave labels out, or name as many.",
    )
    check(
        unnamed(config.labels),
        f"{source} has the classes {', '.join(config.labels)}, in this order; labels={labels!r} would give them other names. Leave "
        "labels out.",
    )
    return {"head": head, "labels": labels}


def unnamed(labels: Sequence[str]) -> bool:
    """Returns whether labels are what transformers calls classes that nobody named: LABEL_0, LABEL_1, ..."""
    return all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def class_number(label: str, labels: Sequence[str], where: str) -> int:
    """Returns the number of a class. Raises `ConfigError` that says where a label stands that is none."""
    check(
        label in labels,
        f"{where}: {shown(label)} is none of the classes ({', '.join(labels)}). Mend the file, or set model.labels.",
    )
    return labels.index(label)
