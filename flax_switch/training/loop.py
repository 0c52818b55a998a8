"""The training loop: prepare, resume, step, evaluate, save, report. Fine-tuning and distillation run in the same one."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.data import Vocabulary
from flax_switch.host.files import in_store
from flax_switch.host.locks import locked
from flax_switch.parallel.mesh import batch_rows
from flax_switch.training.checkpoint import Checkpoints, explain_full_disk
from flax_switch.training.metrics import MetricsWriter, plain
from flax_switch.training.progress import StopSignals, Stopwatch, TrainProgress, console
from flax_switch.training.skipped import Skipped
from flax_switch.training.state import Run, TrainState
from flax_switch.training.stepper import Stepper, build_stepper

Batch = dict[str, np.ndarray]


@runtime_checkable
class Examples(Protocol):
    """Where batches come from: `data.Prepared`, or of fine-tuning `data.tasks.PreparedTasks`."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def train_iterator(self, rows: np.ndarray | None = None) -> Any: ...


@runtime_checkable
class Evaluation(Protocol):
    """What the loop asks of an evaluator: `training.evaluate.Evaluator`, or `workflows.predictions.TaskEvaluator`."""

    def __call__(self, params: Any) -> dict[str, Any]: ...

    def describe(self, evaluation: dict[str, Any]) -> str: ...

    def conclude(self, step: int, params: Any, evaluation: dict[str, Any] | None) -> str | None:
        """Keeps what is worth keeping; why training should end now, or None. `evaluation` is None before the first step."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a call of `pretrain` or `finetune` ended."""

    run: Run
    state: TrainState
    prepared: Examples
    step: int
    finished: bool  # False where a signal stopped it early
    evaluation: dict[str, Any] | None  # of the last step, where it finished


def train(
    run: Run,
    prepared: Examples,
    workdir: epath.Path,
    make_evaluator: Callable[[], Evaluation],
    first_state: Callable[[Run], TrainState],
    make_stepper: Callable[[Run], Stepper] = build_stepper,
    verify: bool = True,
) -> RunResult:
    """Trains from the last whole checkpoint in `workdir`, or from `first_state(run)`, to the end or a signal."""
    with one_run_at_a_time(workdir):
        config = run.config
        checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_every)
        checkpoints.remove_strays()
        batches = prepared.train_iterator(batch_rows(run.mesh, config.data.batch_size))
        if checkpoints.latest_step() is None:
            state, start = first_state(run), 0
        else:
            state, data_state = checkpoints.restore(run.abstract_state, verify=verify, say=console.print)
            batches.set_state(data_state)
            start = int(state.step)
            console.print(f"Continuing {workdir} from step {start}.")
        writer = MetricsWriter(workdir, start)
        try:
            with explain_full_disk(workdir):
                return _train(run, prepared, state, start, batches, checkpoints, writer, make_evaluator(), make_stepper(run))
        finally:
            batches.close()
            checkpoints.close()
            writer.close()


@contextlib.contextmanager
def one_run_at_a_time(workdir: epath.PathLike) -> Iterator[None]:
    """Holds a workdir for this run; a second one is told who holds it. Object storage has no locks: nothing is held there."""
    if jax.process_index() > 0 or in_store(workdir):
        yield
        return
    with locked(workdir, what="training run"):
        yield


def check_vocabulary(config: ExperimentConfig | FinetuneConfig, vocabulary: Vocabulary) -> None:
    """Raises `ConfigError` unless every id of the vocabulary has an embedding."""
    if vocabulary.size > config.model.vocab_size:
        raise ConfigError(
            f"The vocabulary has {vocabulary.size} ids ({vocabulary.num_pieces} pieces and {vocabulary.num_sentinels} sentinels), "
            f"but model.vocab_size is {config.model.vocab_size}; set model.vocab_size={vocabulary.padded_size}."
        )


def _train(
    run: Run, prepared: Examples, state: TrainState, start: int, batches: Any, checkpoints: Checkpoints, writer: MetricsWriter,
    evaluator: Evaluation, stepper: Stepper,
) -> RunResult:  # fmt: skip
    config = run.config.train
    state = stepper.hold(state)
    progress, watch, skipped = TrainProgress(start, config.steps), Stopwatch(), Skipped(config.max_nonfinite_steps)
    evaluation = None
    with StopSignals() as signals:
        step, enough = start, evaluator.conclude(start, None, None)
        while step < config.steps and not signals.stopped and not enough:
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            state, metrics = stepper.step(state, batch)
            step += 1
            signals.check(step)
            if step == start + 1:  # the first step compiled; it says nothing about speed
                jax.block_until_ready(metrics)
                watch = Stopwatch()
            else:
                watch.count(waited, _tokens(batch) * run.config.data.batch_size / len(batch["labels"]))
            progress.advance(step)
            last = step == config.steps
            skipped.add(metrics)
            if step % config.log_every == 0 or last:
                line = {**plain(metrics), **watch.read(), **skipped.read()}
                writer.write(step, "train", line)
                progress.log(step, line)
                skipped.check(step, checkpoints.latest_step())
            if step % config.eval_every == 0 or last:
                paused = watch.pause()
                params = stepper.release(state).params
                evaluation = evaluator(params)
                writer.write(step, "eval", evaluation)
                progress.say(f"step {step}: {evaluator.describe(evaluation)}")
                enough = evaluator.conclude(step, params, evaluation)
                del params  # the next step uses the state up
                watch.resume(paused)
            if step % config.checkpoint_every == 0 or last or signals.stopped or enough:
                paused = watch.pause()
                writer.flush()
                checkpoints.save(stepper.release(state), batches.get_state())
                watch.resume(paused)
        progress.close()
        if signals.stopped and step < config.steps and not enough:
            checkpoints.wait()
            console.print(f"{signals.stopped}: saved at step {step}. Run the same command again to continue.")
            return RunResult(run, stepper.release(state), prepared, step, False, None)
        if enough:
            console.print(f"Training ended at step {step}: {enough}.")
        if evaluation is None:  # the run was complete before this call
            evaluation = evaluator(stepper.release(state).params)
    return RunResult(run, stepper.release(state), prepared, step, True, evaluation)


def _tokens(batch: Batch) -> int:
    """Counts the real tokens of a batch, source and target."""
    return int(batch["attention_mask"].sum() + batch["decoder_attention_mask"].sum())
