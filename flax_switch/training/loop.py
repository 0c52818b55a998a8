"""The training loop: prepare, resume, step, evaluate, save, report. Fine-tuning and distillation run in the same one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from flax_switch import data, partitioning
from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.config_finetuning import FinetuneConfig
from flax_switch.data import Vocabulary
from flax_switch.training.checkpoint import Checkpoints, claim_workdir
from flax_switch.training.evaluate import Evaluator
from flax_switch.training.metrics import MetricsWriter, plain
from flax_switch.training.progress import StopSignals, Stopwatch, TrainProgress, console
from flax_switch.training.state import Run, TrainState, build_run, init_state
from flax_switch.training.step import compile_eval_step, compile_train_step

Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """Where batches come from: `data.Prepared`, or of fine-tuning `data.tasks.PreparedTasks`."""

    vocabulary: Vocabulary

    def train_iterator(self, process_index: int, process_count: int) -> Any: ...


class Evaluation(Protocol):
    """What the loop asks of an evaluator: `training.evaluate.Evaluator`, or `finetuning.evaluate.TaskEvaluator`."""

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


def pretrain(config: ExperimentConfig, workdir: epath.PathLike) -> RunResult:
    """Trains a model as `config` says, in `workdir`; the same call continues a run that was stopped or killed.

    After SIGTERM or Ctrl-C the state is saved and the call returns with `finished=False`. After a kill the run continues from the
    last complete checkpoint, with the losses it would have had. Raises `ConfigError` for settings or data that cannot be used,
    before anything is compiled.
    """
    workdir = claim_workdir(workdir, config)
    mesh = partitioning.create_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh)
    prepared = data.prepare(config.data, workdir=workdir)
    check_vocabulary(config, prepared.vocabulary)
    run = build_run(config, mesh)
    return train(run, prepared, workdir, lambda: Evaluator.of(run, prepared, compile_eval_step(run)), init_state)


def train(
    run: Run,
    prepared: Examples,
    workdir: epath.Path,
    make_evaluator: Callable[[], Evaluation],
    first_state: Callable[[Run], TrainState],
    compile_step: Callable[[Run], Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]] = compile_train_step,
) -> RunResult:
    """Trains from the last checkpoint in `workdir`, or from `first_state(run)`, to the end or a signal."""
    config = run.config
    checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_every)
    batches = prepared.train_iterator(jax.process_index(), jax.process_count())
    if checkpoints.latest_step() is None:
        state, start = first_state(run), 0
    else:
        state, data_state = checkpoints.restore(run.abstract_state)
        batches.set_state(data_state)
        start = int(state.step)
        console.print(f"Continuing {workdir} from step {start}.")
    writer = MetricsWriter(workdir, start)
    try:
        return _train(run, prepared, state, start, batches, checkpoints, writer, make_evaluator(), compile_step(run))
    finally:
        batches.close()
        checkpoints.close()
        writer.close()


def check_vocabulary(config: ExperimentConfig | FinetuneConfig, vocabulary: Vocabulary) -> None:
    """Raises `ConfigError` unless every id of the vocabulary has an embedding."""
    if vocabulary.size > config.model.vocab_size:
        raise ConfigError(
            f"The vocabulary has {vocabulary.size} ids ({vocabulary.num_pieces} pieces and {vocabulary.num_sentinels} sentinels), "
            f"but model.vocab_size is {config.model.vocab_size}; set model.vocab_size={vocabulary.padded_size}."
        )


def _train(
    run: Run,
    prepared: Examples,
    state: TrainState,
    start: int,
    batches: Any,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    evaluator: Evaluation,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
) -> RunResult:
    config = run.config.train
    progress, watch = TrainProgress(start, config.steps), Stopwatch()
    evaluation = None
    with StopSignals() as signals, partitioning.use_mesh(run.mesh):
        step, enough = start, evaluator.conclude(start, state.params, None)
        while step < config.steps and not signals.stopped and not enough:
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            state, metrics = train_step(state, partitioning.shard_batch(batch, run.mesh))
            step += 1
            if step == start + 1:  # the first step compiled; it says nothing about speed
                jax.block_until_ready(metrics)
                watch = Stopwatch()
            else:
                watch.count(waited, _tokens(batch) * jax.process_count())
            progress.advance(step)
            last = step == config.steps
            if step % config.log_every == 0 or last:
                line = {**plain(metrics), **watch.read()}
                writer.write(step, "train", line)
                progress.log(step, line)
                check_finite(line, step)
            if step % config.eval_every == 0 or last:
                paused = watch.pause()
                evaluation = evaluator(state.params)
                writer.write(step, "eval", evaluation)
                progress.say(f"step {step}: {evaluator.describe(evaluation)}")
                enough = evaluator.conclude(step, state.params, evaluation)
                watch.resume(paused)
            if step % config.checkpoint_every == 0 or last or signals.stopped or enough:
                paused = watch.pause()
                checkpoints.save(state, batches.get_state())
                watch.resume(paused)
        if signals.stopped and step < config.steps and not enough:
            checkpoints.save(state, batches.get_state())
            checkpoints.wait()
            progress.close()
            console.print(f"{signals.stopped}: saved at step {step}. Run the same command again to continue.")
            return RunResult(run, state, prepared, step, False, None)
        progress.close()
        if enough:
            console.print(f"Training ended at step {step}: {enough}.")
        if evaluation is None:  # the run was complete before this call
            evaluation = evaluator(state.params)
    return RunResult(run, state, prepared, step, True, evaluation)


def check_finite(metrics: dict[str, Any], step: int) -> None:
    """Raises `FloatingPointError` where the loss is no number any more: going on would only overwrite good checkpoints."""
    if not np.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"The loss is {metrics['loss']} at step {step}. Earlier checkpoints are kept. Lower optimizer.learning_rate, raise "
            "optimizer.warmup_steps, or set optimizer.clip_global_norm; in bfloat16 keep model.router_dtype='float32'."
        )


def _tokens(batch: Batch) -> int:
    """Real tokens of a batch, source and target."""
    return int(batch["attention_mask"].sum() + batch["decoder_attention_mask"].sum())
