"""Evaluation on validation examples: cross-entropy, generation with beams, scores, predictions beside references."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_switch.config.adapter import ADAPTER
from flax_switch.config.finetuning import LOSS, LOWER, FinetuneConfig
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.convert.adapter import Adapter, fingerprint, uniform
from flax_switch.convert.adapter_folder import write_adapter
from flax_switch.convert.canonical import flatten
from flax_switch.convert.scan import unstack_layers
from flax_switch.convert.tensors import from_array
from flax_switch.data.tasks import PreparedTask, PreparedTasks, spread
from flax_switch.generation.defaults import write_prefixes
from flax_switch.generation.text import generate_batches
from flax_switch.host.files import write_text
from flax_switch.parallel import processes
from flax_switch.parallel.arrays import let_first_read
from flax_switch.parallel.mesh import batch_rows
from flax_switch.pretrained import save_pretrained
from flax_switch.training.evaluate import mean_metrics
from flax_switch.training.metrics import read_metrics
from flax_switch.training.state import Run
from flax_switch.workflows.scores import score
from flax_switch.workflows.task_predictions import evaluate_heads

PREDICTIONS = "predictions"
BEST = "best"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A line of a predictions file."""

    task: str
    inputs: str
    prediction: str
    references: tuple[str, ...]


@dataclasses.dataclass
class TaskEvaluator:
    """Evaluates parameters, writes predictions and keeps the best checkpoint in `workdir/best`."""

    run: Run
    prepared: PreparedTasks
    eval_step: Callable[[Any, Any], dict[str, Any]]
    workdir: epath.Path
    predictions: list[Prediction] = dataclasses.field(default_factory=list)  # of the last call
    history: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (step, the score that decides)

    def __call__(self, params: Any) -> dict[str, Any]:
        """Returns scores by name; with several tasks "task/score" too, and their means under the scores' own names."""
        if not self.prepared.num_validation:
            return {}
        evaluation, self.predictions = evaluate(self.run, self.prepared, self.eval_step, params)
        return processes.from_first(evaluation)  # no host's arithmetic may have one process stop and another go on

    def describe(self, evaluation: dict[str, Any]) -> str:
        """Returns the scores as a line."""
        return describe(finetuning_config(self.run), evaluation, len(self.predictions))

    def conclude(self, step: int, params: Any, evaluation: dict[str, Any] | None) -> str | None:
        """Writes predictions, keeps the best parameters, and says when there has been no better one for long enough.

        What came before this call is read from the run's metrics, so that a resumed run ends where an undisturbed one would.
        """
        if not self.prepared.num_validation:
            return None
        config = finetuning_config(self.run)
        name, patience = config.best, config.evaluation.patience
        if evaluation is None:
            lines = read_metrics(self.workdir) if jax.process_index() == 0 else ()
            found = [(line["step"], line[name]) for line in lines if line["kind"] == "eval"]
            self.history = [(at, value) for at, value in processes.from_first(found)]
        else:
            self.history.append((step, evaluation[name]))
            self._keep(step, params)
        if not self.history:
            return None
        best_step, best_value = best_of(self.history, name)
        since = sum(1 for at, _ in self.history if at > best_step)
        if patience is not None and since >= patience:
            return f"{name} has not improved on its {best_value:.3f} of step {best_step} in {since} evaluations"
        return None

    def _keep(self, step: int, params: Any) -> None:
        if jax.process_index() == 0:
            write_predictions(self.workdir / PREDICTIONS / f"step_{step}.jsonl", self.predictions)
        if best_of(self.history, finetuning_config(self.run).best)[0] == step:
            let_first_read(params, self._save)

    def _save(self, params: Any) -> None:
        """Writes the best model, or the adapter that was trained for it."""
        path, model = str(self.workdir / BEST), self.run.config.model
        if ADAPTER in params:
            write_adapter(path, trained_adapter(self.run, params), model, format="flax_switch")
        else:
            save_pretrained(path, model, params, self.prepared.vocabulary, format="flax_switch")
        write_prefixes(self.workdir / BEST, finetuning_config(self.run).prefixes, model)


def trained_adapter(run: Run, params: Any) -> Adapter:
    """Returns the adapter among a run's parameters."""
    config = finetuning_config(run)
    tensors = {path: from_array(leaf) for path, leaf in flatten(unstack_layers(params[ADAPTER])).items()}
    found = uniform(config.adapter, tensors, config.init, fingerprint(flatten(params), config.model.embedding_path))
    return dataclasses.replace(found, prefixes=config.prefixes)


def finetuning_config(run: Run) -> FinetuneConfig:
    """Returns the config of a run that fine-tunes."""
    assert isinstance(run.config, FinetuneConfig)
    return run.config


def best_of(history: Sequence[tuple[int, float]], name: str) -> tuple[int, float]:
    """Returns (step, value) of the first best of (step, value) pairs; the lowest of what is better when lower."""
    sign = -1.0 if name.rpartition("/")[2] in LOWER else 1.0
    return max(history, key=lambda entry: (sign * entry[1], -entry[0]))


def describe(config: FinetuneConfig, evaluation: dict[str, Any], examples: int = 0) -> str:
    """Returns an evaluation as a line: cross-entropy, and scores over so many examples (0: not said)."""
    if not evaluation:
        return "no validation examples"
    tasks = [f"{task.name}/" for task in config.data.tasks] if len(config.data.mixture) > 1 else []
    names = [name for prefix in ("", *tasks) for name in (prefix + s for s in config.scores) if name in evaluation]
    scores = [f"{name} {evaluation[name]:.2f}" for name in names]
    percents = [name for name in names if name.rpartition("/")[2] not in LOWER]
    over = f", over {examples:,} example{'s' * (examples != 1)}" if examples else ""
    told = [f"({'of 100' if percents else 'lower is better'}{over})"] if scores else []
    loss = f"{LOSS} {evaluation[LOSS]:.3f} nats/token" if config.model.head == LANGUAGE_MODEL else f"loss {evaluation[LOSS]:.3f}"
    return "  ".join([loss, *scores, *told])


def evaluate(
    run: Run, prepared: PreparedTasks, eval_step: Callable[[Any, Any], dict[str, Any]], params: Any
) -> tuple[dict[str, Any], list[Prediction]]:
    """Returns metrics and predictions. The cross-entropy is over `train.eval_batches` batches, scores over all chosen examples.

    Of a head for a task the loss, too, is over all chosen examples."""
    if run.config.model.head != LANGUAGE_MODEL:
        means, said = evaluate_heads(run, finetuning_config(run), prepared, eval_step, params)
        each = ((task, *one) for task, examples, texts in said for one in zip(examples, texts, strict=True))
        return means, [Prediction(task, example.inputs, text, example.references) for task, example, text in each]
    rows = batch_rows(run.mesh, run.config.data.batch_size)
    batches = prepared.validation_batches(run.config.train.eval_batches, rows)
    means = mean_metrics(run, eval_step, params, batches, prepared.vocabulary)
    means["token_accuracy"] = means.pop("accuracy")
    del means["text_cross_entropy"]
    by_task, predictions = [], []
    for task in prepared.tasks:
        wanted = finetuning_config(run).metrics_of(task.config)
        if wanted and task.validation:
            made = predict(run, prepared, task, params)
            texts, references = [p.prediction for p in made], [p.references for p in made]
            tokenizer = finetuning_config(run).evaluation.tokenizer
            by_task.append({name: value for m in wanted for name, value in score(m, texts, references, tokenizer).items()})
            predictions += made
            if len(prepared.tasks) > 1:
                means |= {f"{task.config.name}/{name}": value for name, value in by_task[-1].items()}
    names = dict.fromkeys(name for scores in by_task for name in scores)
    return means | {name: float(np.mean([s[name] for s in by_task if name in s])) for name in names}, predictions


def predict(run: Run, prepared: PreparedTasks, task: PreparedTask, params: Any) -> list[Prediction]:
    """Returns what the model generates for a task's validation examples, of which `evaluation.max_examples` are taken."""
    settings, config = finetuning_config(run).evaluation, run.config.data
    chosen = spread(task.validation, settings.max_examples)
    examples = task.validation_pairs.examples(np.array(chosen), np.zeros(len(chosen), np.int64))
    lengths = examples.input_lengths - run.config.model.decoder_only  # joined to its targets an input has no EOS
    sources = ((i, examples.inputs[i, :length].tolist()) for i, length in enumerate(lengths))
    beams: dict[str, Any] = {"brevity_penalty": settings.brevity_penalty} if settings.num_beams > 1 else {}
    texts: dict[int, str] = {}
    for numbers, sequences, _ in generate_batches(
        run.model,
        run.in_use(params),
        sources,
        batch_size=settings.batch_size,
        longest=config.inputs_length,
        max_new_tokens=settings.max_new_tokens or config.targets_length,
        num_beams=settings.num_beams,
        only_new=True,
        **beams,
    ):
        texts |= {i: prepared.vocabulary.decode(rows[0]) for i, rows in zip(numbers, sequences, strict=True)}
    pairs = ((task.validation[index], texts[i]) for i, index in enumerate(chosen))
    return [Prediction(task.config.name, example.inputs, text, example.references) for example, text in pairs]


def write_predictions(path: epath.Path, predictions: Sequence[Prediction]) -> None:
    """Writes JSON lines {"task", "inputs", "prediction", "references"}."""
    if predictions:
        write_text(path, "".join(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in predictions))
