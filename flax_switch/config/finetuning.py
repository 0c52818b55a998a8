"""Settings of fine-tuning: tasks and their mixture, evaluation by generation, and T5X's defaults for the optimiser.

A recipe says what of a checkpoint's config changes (`FinetuneRecipe.model`); with the checkpoint it becomes a `FinetuneConfig`,
which is what a run's workdir holds. Like `flax_switch.config`, this module imports nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from flax_switch.config import MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig, check, one_of, reject_unknown_keys
from flax_switch.config.adapter import ADAPTER, AdapterConfig
from flax_switch.config.base import _Section, _tuples, may_change
from flax_switch.config.heads import HEADS, LANGUAGE_MODEL, head_shapes, targets_length
from flax_switch.config.ranges import Count, Every, Natural, Positive, Range, Rate
from flax_switch.config.run import BatchConfig, check_microbatches, joined_for

# Metric -> the scores it gives, higher is better for all but those in LOWER.
METRICS: dict[str, tuple[str, ...]] = {
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "accuracy": ("accuracy",),
    "matthews": ("matthews",),
    "pearson": ("pearson",),
    "spearman": ("spearman",),
    "mse": ("mse",),
    "span_f1": ("span_f1",),
    "retrieval": ("recall_at_1", "recall_at_5", "recall_at_10"),
}
# Head -> the metrics of what it says; a language model's are of texts.
HEAD_METRICS: dict[str, tuple[str, ...]] = {
    LANGUAGE_MODEL: ("bleu", "chrf", "rouge", "exact_match", "f1", "accuracy"),
    "classification": ("accuracy", "f1", "matthews"),
    "multi_label_classification": ("f1", "accuracy"),
    "regression": ("pearson", "spearman", "mse"),
    "token_classification": ("span_f1", "accuracy"),
    "question_answering": ("exact_match", "f1"),
    "embedding": ("retrieval",),
}
LOWER = ("cross_entropy", "mse")  # scores that are better when lower
# What counts as a word in ROUGE and BLEU. "auto": by the script of the references.
SCORE_TOKENIZERS = ("auto", "latin", "unicode", "characters")
LOSS = "cross_entropy"  # of the validation targets; of a head for a task its loss


@dataclasses.dataclass(frozen=True)
class TaskConfig(_Section):
    """One text-to-text task: where its examples are, and how inputs and targets read.

    `train` and `validation` name files, folders or globs of records (.jsonl, .json, .tsv, .csv, .parquet, .arrayrecord), a folder
    that `datasets` saved, or the common stem of two plain text files whose endings are `inputs` and `targets`: corpus/train with
    "en" and "de" means corpus/train.en and corpus/train.de.
    """

    section: ClassVar[str] = "data.tasks"

    name: str = "task"
    train: str | tuple[str, ...] | None = None
    validation: str | tuple[str, ...] | None = None  # None: data.validation_fraction of train
    inputs: str | Natural = "inputs"  # a field (translation.en reaches inside), a column's number, or "question: {question} ..."
    targets: str | Natural = "targets"  # likewise; a list of texts is several references, the first of which is learnt
    context: str | None = None  # of head="question_answering": the field in which targets are spans; inputs is the question
    prefix: str = ""  # before every input, such as "summarize: "
    labels: tuple[str, ...] = ()  # the texts that whole-number targets 0, 1, ... stand for
    metrics: tuple[str, ...] | None = None  # None: evaluation.metrics
    rate: Positive | None = None  # in a mixture; None: by the number of examples

    def __post_init__(self) -> None:
        super().__post_init__()
        for metric in self.metrics or ():
            one_of(f"the metrics of {self.name!r}", metric, tuple(METRICS))


@dataclasses.dataclass(frozen=True)
class FinetuneDataConfig(TaskConfig, BatchConfig):
    """The data of a fine-tuning run: one task, given by the fields of `TaskConfig`, or several in `tasks`; and their batches."""

    section: ClassVar[str] = "data"

    tasks: tuple[TaskConfig, ...] = ()
    # K: a task counts as at most so many examples (T5's examples-proportional mixing)
    mixing_limit: Annotated[int, Range(least=1, off="None sets no limit.")] | None = None
    mixing_temperature: Annotated[float, Range(least=0.1)] = 1.0  # T: rates are min(examples, K) ** (1/T)
    validation_fraction: Rate = 0.05  # of examples, by a hash of their inputs, where a task names no validation file
    skip_empty: bool = False  # leave out examples without inputs or targets, instead of refusing the file
    batch_tokens: Count | None = None  # source tokens per step: decides batch_size where it is set

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens is not None:
            check(
                self.batch_tokens >= self.inputs_length,
                f"data.batch_tokens ({self.batch_tokens}) must hold at least one row of data.inputs_length ({self.inputs_length}).",
            )
            object.__setattr__(self, "batch_size", self.batch_tokens // self.inputs_length)
        names = [task.name for task in self.tasks]
        check(len(set(names)) == len(names), f"The tasks of a mixture need different names; these are {', '.join(names)}.")
        check(
            not self.tasks or (self.train is None and self.validation is None),
            "data.train and data.validation are one task's; with data.tasks each task names its own files.",
        )
        rated = [task.rate is not None for task in self.tasks]
        check(all(rated) or not any(rated), "Either every task of a mixture has a rate, or none: then numbers of examples decide.")

    @property
    def mixture(self) -> tuple[TaskConfig, ...]:
        """The tasks, of which there may be one."""
        if self.tasks:
            return self.tasks
        return (TaskConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TaskConfig)}),)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(_Section):
    """Evaluation on the validation examples: generation with beams, metrics, the best checkpoint, early stopping."""

    section: ClassVar[str] = "evaluation"

    metrics: tuple[str, ...] = ()  # of METRICS
    tokenizer: str = "auto"  # of ROUGE and BLEU, of SCORE_TOKENIZERS; "latin" is theirs, for the Latin alphabet
    best: str | None = None  # the score by which the best checkpoint is kept; None: the first metric's, else cross_entropy
    # evaluations in a row without a new best after which training ends
    patience: Annotated[int, Range(least=1, off="None never stops early.")] | None = may_change(None)
    # of each task, spread evenly over its validation examples
    max_examples: Annotated[int, Range(least=1, off="None takes all.")] | None = None
    batch_size: Count = may_change(32)
    num_beams: Annotated[int, Range(1, largest=1024)] = 4
    brevity_penalty: Annotated[float, Range(0, 10, off="None turns it off.")] | None = 0.6  # T5X's alpha
    max_new_tokens: Count | None = None  # None: data.targets_length

    def __post_init__(self) -> None:
        super().__post_init__()
        for metric in self.metrics:
            one_of("evaluation.metrics", metric, tuple(METRICS))
        one_of("evaluation.tokenizer", self.tokenizer, SCORE_TOKENIZERS)


@dataclasses.dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """The optimiser; the defaults are T5X's for fine-tuning: Adafactor at a constant 1e-3."""

    schedule: str = "constant"
    learning_rate: Positive = may_change(1e-3)
    warmup_steps: Natural = 0


@dataclasses.dataclass(frozen=True)
class FinetuneTrainConfig(TrainConfig):
    """The training loop; an evaluation generates, so it costs more than pre-training's."""

    steps: Count = may_change(10_000)
    eval_every: Every = may_change(500)
    checkpoint_every: Every = may_change(500)
    keep_last: Count = may_change(1)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(_Section):
    """A whole fine-tuning run, with the model's config in full: what its workdir holds."""

    kind: ClassVar[str] = "finetuning"

    model: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    data: FinetuneDataConfig = dataclasses.field(default_factory=FinetuneDataConfig)
    optimizer: FinetuneOptimizerConfig = dataclasses.field(default_factory=FinetuneOptimizerConfig)
    mesh: MeshConfig = may_change(MeshConfig)
    train: FinetuneTrainConfig = dataclasses.field(default_factory=FinetuneTrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    init: str = ""  # where the parameters came from

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data", labelled_for(self.model, joined_for(self.model, self.data)))
        object.__setattr__(self, "optimizer", _optimizer_for(self.adapter, self.optimizer))
        check(
            not self.adapter.rank or not head_shapes(self.model),
            f"adapter.rank={self.adapter.rank} trains an adapter alone, and the head {self.model.head!r} would stay as it began; "
            "train the whole model with adapter.rank=0, or optimizer.trainable.",
        )
        check_microbatches(self.data, self.train)
        check_contrast(self)
        for task in self.data.mixture:
            for metric in self.metrics_of(task):
                one_of(f"a metric with head={self.model.head!r}", metric, HEAD_METRICS[self.model.head])
        one_of("evaluation.best", self.best, (*self.scores, LOSS))

    def metrics_of(self, task: TaskConfig) -> tuple[str, ...]:
        """Returns the metrics a task is evaluated with."""
        return self.evaluation.metrics if task.metrics is None else task.metrics

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores that evaluation gives, each once."""
        return tuple(dict.fromkeys(score for task in self.data.mixture for m in self.metrics_of(task) for score in METRICS[m]))

    @property
    def best(self) -> str:
        """The score by which the best checkpoint is kept."""
        return self.evaluation.best or next(iter(self.scores), LOSS)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What stands before the inputs of the tasks, each text once."""
        return tuple(dict.fromkeys(task.prefix for task in self.data.mixture))


def labelled_for(model: SwitchConfig, data: FinetuneDataConfig) -> FinetuneDataConfig:
    """Returns settings of data with the labels' length that a model's head asks for; raises for what it cannot be trained on."""
    head = model.head
    for task in data.mixture:
        check(
            (task.context is not None) == (head == "question_answering"),
            f"data.context is the field in which a span is found, for head='question_answering'; it is {task.context!r}, and "
            f"head is {head!r}.",
        )
        check(
            head != "token_classification" or not task.prefix,
            f"data.prefix would need tags of its own with head={head!r}; leave {task.prefix!r} out.",
        )
    if head == LANGUAGE_MODEL:
        return data
    check(
        not data.packing, f"data.packing puts several examples in a row, of which head={head!r} takes one; set data.packing=False."
    )
    length = data.inputs_length if head == "token_classification" else targets_length(model)
    return data if length in (None, data.targets_length) else data.replace(targets_length=length)


def check_contrast(config: FinetuneConfig) -> None:
    """Raises `ConfigError` where a batch whose rows are compared with each other would be cut."""
    if config.model.head != "embedding":
        return
    check(
        config.train.microbatches == 1 and config.mesh.mode == "jit" and config.data.batch_size > 1,
        "head='embedding' compares every row of a batch with all others: set train.microbatches=1, mesh.mode='jit' and "
        f"data.batch_size of 2 or more; they are {config.train.microbatches}, {config.mesh.mode!r} and {config.data.batch_size}.",
    )


def _optimizer_for(adapter: AdapterConfig, optimizer: FinetuneOptimizerConfig) -> FinetuneOptimizerConfig:
    """Returns the optimiser of an adapter, which is all that it trains; where there is none the optimiser as it is.

    Raises `ConfigError` for one that moves parameters relative to their size: b begins at zero, and would stay there.
    """
    if not adapter.rank:
        return optimizer
    trained = f"^{ADAPTER}/"
    check(
        optimizer.trainable in (FinetuneOptimizerConfig.trainable, trained),
        f"adapter.rank={adapter.rank} trains the adapter alone; leave optimizer.trainable={optimizer.trainable!r} out, and say "
        "with adapter.targets which kernels have one.",
    )
    check(
        optimizer.name in ("adafactor", "adamw"),
        f"optimizer.name={optimizer.name!r} moves a parameter by its size, and an adapter's b begins at zero. Set adafactor, which "
        "does not where there is an adapter, or adamw.",
    )
    return optimizer.replace(trainable=trained, multiply_by_parameter_scale=False)


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe(_Section):
    """What a fine-tuning recipe in configs/ says; `model` holds the fields of the checkpoint's config that it changes."""

    kind: ClassVar[str] = "finetuning"

    model: dict = dataclasses.field(default_factory=dict)
    data: FinetuneDataConfig = dataclasses.field(default_factory=FinetuneDataConfig)
    optimizer: FinetuneOptimizerConfig = dataclasses.field(default_factory=FinetuneOptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: FinetuneTrainConfig = dataclasses.field(default_factory=FinetuneTrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        reject_unknown_keys(SwitchConfig, self.model)
        for name, value in self.model.items():
            SwitchConfig.check_field(name, _tuples(value))
        head = self.model.get("head", LANGUAGE_MODEL)
        one_of("model.head", head, tuple(HEADS))
        labels = self.model.get("labels") or (("0", "1") if HEADS[head].labelled else ())  # a checkpoint may have them
        self.resolve(SwitchConfig(head=head, labels=_tuples(labels)))

    def resolve(self, model: SwitchConfig, init: str = "") -> FinetuneConfig:
        """Returns the run's config, for a checkpoint whose config (with the changes made) is `model`."""
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        sections["data"] = self.data.replace(joined=model.decoder_only)
        return FinetuneConfig(model=model, init=init, **sections)
