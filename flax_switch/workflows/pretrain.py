"""Pre-training: from a config to a trained model in a folder."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from flax_switch import data
from flax_switch.config import ExperimentConfig, expect
from flax_switch.parallel import processes
from flax_switch.parallel.mesh import check_batch_size, create_mesh
from flax_switch.training.checkpoint import claim_workdir, flat_fields
from flax_switch.training.evaluate import Evaluator
from flax_switch.training.loop import check_vocabulary, given_back_if_refused, train
from flax_switch.training.progress import console
from flax_switch.training.saved_program import program_stepper
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_eval_step
from flax_switch.training.stepper import build_stepper
from flax_switch.training.trackers import Tracker, require_trackers
from flax_switch.workflows.result import Result


def pretrain(
    config: ExperimentConfig, workdir: epath.PathLike, *, profile: int = 0, log: Sequence[Tracker] = (), verify: bool = True,
    program: epath.PathLike | None = None,
) -> Result:  # fmt: skip
    """Trains a model as `config` says, in `workdir`; the same call continues a run that was stopped or killed.

    After SIGTERM or Ctrl-C the state is saved and the call returns with `finished=False`. After a kill the run continues from the
    last checkpoint that is whole, with the losses it would have had. Raises `ConfigError` for settings or data that cannot be used,
    before anything is compiled. With several processes (`flax_switch.parallel.processes`) every one of them makes this call.
    `verify`: compare every file of a checkpoint with its checksum before it is used. `profile` steps are traced by jax.profiler
    into `workdir/profile`; functions in `log` get (step, kind, metrics) of every line. `program`: a folder in which a plan has kept
    this run's train step (`training.saved_program`), which is then not compiled.
    """
    expect("config", config, ExperimentConfig, "Give a recipe's, such as fs.load_recipe('tiny').")
    console.quiet = jax.process_index() != 0
    processes.require_same({"workdir": str(workdir), "jax": jax.__version__, **flat_fields(config)})
    require_trackers(config.train.log_to)
    mesh = create_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh)
    run = build_run(config, mesh)
    stepper = None if program is None else program_stepper(run, program)
    with given_back_if_refused(workdir):
        workdir = processes.first_process_first(lambda: claim_workdir(workdir, config))
        prepared = processes.first_process_first(lambda: data.prepare(config.data, workdir=workdir, quiet=console.quiet))
        processes.require_same({"corpus and vocabulary (by hash)": prepared.fingerprint})
        check_vocabulary(config, prepared.vocabulary)
    evaluator = lambda: Evaluator.of(run, prepared, compile_eval_step(run))  # noqa: E731
    options: dict[str, Any] = dict(profile=profile, log=log, verify=verify)
    make_stepper = build_stepper if stepper is None else lambda _: stepper
    return Result.of(train(run, prepared, workdir, evaluator, init_state, make_stepper, **options), workdir)
