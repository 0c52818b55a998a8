"""The training loop: prepare, resume, step, evaluate, save, report. Fine-tuning and distillation run in the same one."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.flops import train_flops
from flax_switch.data import Vocabulary
from flax_switch.host.files import in_store
from flax_switch.host.locks import locked
from flax_switch.host.peaks import peak_flops
from flax_switch.ops.kernels.slow_dtype import slow_dtype
from flax_switch.parallel.mesh import batch_rows
from flax_switch.parallel.watchdog import Watchdog
from flax_switch.training.checkpoint import CHECKPOINTS, CONFIG_FILE, Checkpoints, explain_full_disk
from flax_switch.training.metrics import MetricsWriter, plain
from flax_switch.training.profile import Profile
from flax_switch.training.progress import StopSignals, Stopwatch, TrainProgress, console
from flax_switch.training.sessions import Session
from flax_switch.training.skipped import Skipped
from flax_switch.training.state import Run, TrainState
from flax_switch.training.stepper import Stepper, build_stepper
from flax_switch.training.trackers import Tracker, guarded, open_trackers

Batch = dict[str, np.ndarray]


@runtime_checkable
class Examples(Protocol):
    """Where batches come from: `data.Prepared`, or of fine-tuning `data.tasks.PreparedTasks`."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def train_iterator(self, rows: np.ndarray | None = None) -> Any: ...

    def describe(self) -> list[dict[str, Any]]:
        """Returns what there is to say of the data: a dict for each corpus or task."""
        ...


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
    profile: int = 0,
    log: Sequence[Tracker] = (),
    verify: bool = True,
) -> RunResult:
    """Trains from the last whole checkpoint in `workdir`, or from `first_state(run)`, to the end or a signal.

    profile: so many steps are traced into `workdir/profile`. log: functions of (step, "train" or "eval", metrics), told what
    metrics.jsonl is.
    """
    with one_run_at_a_time(workdir):
        config = run.config
        checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_every)
        checkpoints.remove_strays()
        batches = prepared.train_iterator(batch_rows(run.mesh, config.data.batch_size))
        if checkpoints.latest_step() is None:
            state, start = first_state(run), 0
        else:
            state, data_state = checkpoints.restore(run.abstract_state, verify=verify, say=console.print)
            if missing := run.abstract_state.params.keys() - state.params.keys():  # what an adapter is for is in no checkpoint
                base = first_state(run).params
                state = dataclasses.replace(state, params={**state.params, **{name: base[name] for name in missing}})
            batches.set_state(data_state)
            start = int(state.step)
            console.print(_continues(workdir, start, config.train.steps))
        if said := slow_dtype(config.model):
            console.print(said)
        session, trace = Session(workdir, start, prepared.describe()), Profile(workdir, start, profile)
        trackers = open_trackers(workdir, config, start) if jax.process_index() == 0 else []
        writer = MetricsWriter(workdir, start, [*trackers, *(guarded(one, "log") for one in log)])
        try:
            with explain_full_disk(workdir):
                result = _train(
                    run, prepared, state, start, batches, checkpoints, writer, make_evaluator(), make_stepper(run), trace
                )
            session.end(result.step)
            return result
        finally:
            trace.close()
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


@contextlib.contextmanager
def given_back_if_refused(workdir: epath.PathLike) -> Iterator[None]:
    """Leaves a new workdir unclaimed where what follows the claim is refused, so that other settings can have it."""
    workdir = epath.Path(workdir)
    new = not (workdir / CONFIG_FILE).exists()
    try:
        yield
    except ConfigError:
        if new and jax.process_index() == 0 and not (workdir / CHECKPOINTS).exists():
            (workdir / CONFIG_FILE).unlink(missing_ok=True)
            if (workdir / "vocabulary").exists():
                (workdir / "vocabulary").rmtree()
        raise


def check_vocabulary(config: ExperimentConfig | FinetuneConfig, vocabulary: Vocabulary) -> None:
    """Raises `ConfigError` unless every id of the vocabulary has an embedding, and the decoder begins as it does in batches."""
    start = config.model.decoder_start_token_id
    if start != 0:
        raise ConfigError(
            f"model.decoder_start_token_id is {start}, and batches that are made of text begin a decoder's inputs with 0, as T5's. "
            "Train this model by a loop of your own (docs/custom_training.md), which takes its ids as they are."
        )
    if vocabulary.size > config.model.vocab_size:
        raise ConfigError(
            f"The vocabulary has {vocabulary.size} ids ({vocabulary.num_pieces} pieces and {vocabulary.num_sentinels} sentinels), "
            f"but model.vocab_size is {config.model.vocab_size}; set model.vocab_size={vocabulary.padded_size}."
        )


def _train(
    run: Run, prepared: Examples, state: TrainState, start: int, batches: Any, checkpoints: Checkpoints, writer: MetricsWriter,
    evaluator: Evaluation, stepper: Stepper, profile: Profile,
) -> RunResult:  # fmt: skip
    config = run.config.train
    state = stepper.hold(state)
    progress, watch, skipped = _progress(run.config, start), Stopwatch(), Skipped(config.max_nonfinite_steps)
    evaluation = None
    with StopSignals() as signals, Watchdog(config.step_timeout, start) as watchdog:
        step, enough = start, evaluator.conclude(start, None, None)
        while step < config.steps and not signals.stopped and not enough:
            profile.before(step)
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            with watchdog.step(step + 1) as over:
                state, metrics = stepper.step(state, batch)
                over(metrics)
            step += 1
            profile.after(step, metrics)
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
                paused = watch.pause(metrics)
                params = stepper.release(state).params
                evaluation = evaluator(params)
                writer.write(step, "eval", evaluation)
                progress.say(f"step {step}: {evaluator.describe(evaluation)}")
                enough = evaluator.conclude(step, params, evaluation)
                del params  # the next step uses the state up
                watch.resume(paused)
            if step % config.checkpoint_every == 0 or last or signals.stopped or enough:
                paused = watch.pause(metrics)
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


def _progress(config: ExperimentConfig | FinetuneConfig, start: int) -> TrainProgress:
    """Makes the display, which knows the FLOPs of a step and what the devices can do."""
    data, devices = config.data, jax.devices()
    flops = train_flops(config.model, data.batch_size, data.inputs_length, data.targets_length)
    peak = peak_flops(devices[0].device_kind)
    return TrainProgress(start, config.train.steps, flops, peak and peak * len(devices))


def _continues(workdir: epath.PathLike, step: int, steps: int) -> str:
    done = "" if step < steps else f" That is step {step} of {steps}: nothing left to do. Raise train.steps to train on."
    return f"Continuing {workdir} from step {step}.{done}"


def _tokens(batch: Batch) -> int:
    """Counts the real tokens of a batch, source and target."""
    return int(sum(mask.sum() for name, mask in batch.items() if name.endswith("attention_mask")))
