"""`finetune` and `evaluate_checkpoint`: what the commands of these names do."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flax_switch.config import check, expect
from flax_switch.config.adapter import ADAPTER, AdapterConfig
from flax_switch.config.finetuning import FinetuneConfig, FinetuneOptimizerConfig, FinetuneRecipe
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.convert.adapter import fingerprint, same_model
from flax_switch.convert.adapter_folder import read_fingerprint
from flax_switch.convert.canonical import flatten
from flax_switch.convert.training_run import BASE_FILE
from flax_switch.data.tasks import PreparedTasks, prepare_tasks
from flax_switch.data.vocabulary import SETTINGS_FILE
from flax_switch.generation.defaults import write_prefixes
from flax_switch.host.files import write_text
from flax_switch.nn.adapter import has_adapter
from flax_switch.ops.kernels.on_disk import run_reading
from flax_switch.parallel import processes
from flax_switch.parallel.arrays import let_first_read
from flax_switch.parallel.mesh import check_batch_size, create_mesh
from flax_switch.training.checkpoint import claim_workdir, flat_fields
from flax_switch.training.freezing import trainable_part
from flax_switch.training.loop import check_vocabulary, train
from flax_switch.training.progress import console
from flax_switch.training.state import Run, TrainState, build_run
from flax_switch.training.step import compile_eval_step
from flax_switch.training.trackers import Tracker, require_trackers
from flax_switch.workflows import scores
from flax_switch.workflows.predictions import Prediction, TaskEvaluator, evaluate
from flax_switch.workflows.result import Result
from flax_switch.workflows.start import Start, open_start

TASKS_FILE = "tasks.json"


def finetune(
    recipe: FinetuneRecipe, workdir: epath.PathLike, *, init: str, vocabulary: str | None = None, mesh: Mesh | None = None,
    profile: int = 0, log: Sequence[Tracker] = (), verify: bool = True,
) -> Result:  # fmt: skip
    """Fine-tunes the checkpoint `init` as the recipe says, in `workdir`; the same call continues a run that was stopped or killed.

    With several processes (`flax_switch.parallel.processes`) every one of them makes this call.

    Args:
      init: anything `load_pretrained` opens, or "random:" before it (or before a preset's name) for random parameters.
      vocabulary: a SentencePiece model or a folder with a vocabulary, in place of the checkpoint's.
      mesh: by default one over all devices, as `recipe.mesh` says.
      profile: so many steps are traced by jax.profiler into `workdir/profile`.
      log: functions of (step, "train" or "eval", metrics).
      verify: compare checkpoints with their checksums before they are used.

    Raises:
      ConfigError: for settings, files or metrics that cannot be used, before anything is compiled.
    """
    expect("recipe", recipe, FinetuneRecipe, "Give one such as fs.load_recipe('finetune_summarization').")
    expect(
        "init",
        init,
        (str, os.PathLike),
        "Give what load_pretrained opens; model.save_pretrained(FOLDER) makes a folder.",
    )
    console.quiet = jax.process_index() != 0
    require_trackers(recipe.train.log_to)
    start = processes.first_process_first(lambda: open_start(init, recipe.model, vocabulary, verify))
    if recipe.adapter.rank:
        check(start.source is not None, f"--init {init} draws a model that no file holds; an adapter is nothing without its model.")
    else:
        start.config.check_trainable()
    config = recipe.resolve(start.config, init)
    _require_same(config, start, workdir=str(workdir))
    mesh = _checked(config, mesh)
    check_vocabulary(config, start.vocabulary)
    prepared = _prepared(config, start)
    run = build_run(config, mesh)
    workdir = processes.first_process_first(lambda: _claimed(workdir, config, start, prepared))
    if config.optimizer.trainable != ".*":
        trained = trainable_part(run.abstract_state.params, config.optimizer.trainable)
        console.print(f"Training {_count(trained):,} of {_count(run.abstract_state.params):,} parameters.")
    first_state = functools.partial(_first_state, start, run, workdir)
    evaluator = lambda: TaskEvaluator(run, prepared, compile_eval_step(run), workdir)  # noqa: E731
    options: dict[str, Any] = dict(profile=profile, log=log, verify=verify)
    return Result.of(train(run, prepared, workdir, evaluator, first_state, **options), workdir)


def _claimed(workdir: epath.PathLike, config: FinetuneConfig, start: Start, prepared: PreparedTasks) -> epath.Path:
    """Returns the workdir, which is this run's, with what is known of it before the first step; process 0 writes that."""
    workdir = claim_workdir(workdir, config)
    if jax.process_index() == 0:
        if not (workdir / "vocabulary" / SETTINGS_FILE).exists():
            start.vocabulary.save(workdir / "vocabulary")
        write_prefixes(workdir, config.prefixes, config.model)
        write_text(workdir / TASKS_FILE, json.dumps(prepared.describe(), indent=2) + "\n")
    return workdir


def _first_state(start: Start, run: Run, workdir: epath.Path, _: Run) -> TrainState:
    """Returns the state of step 0; of an adapter's run that resumes raises `ConfigError` where its model is another by now."""
    state = start.state(run)

    def check_base(params: Any) -> None:
        known, found = read_fingerprint(workdir), fingerprint(flatten(params), run.config.model.embedding_path)
        check(
            not known or same_model(known, found),
            f"--init {start.source} is another model than the one that this run's adapter is trained on. Give that one, or name "
            "a new --workdir.",
        )
        write_text(workdir / BASE_FILE, json.dumps({"fingerprint": found}) + "\n")

    if ADAPTER in state.params:
        let_first_read(state.params, check_base)
    return state


def evaluate_checkpoint(
    recipe: FinetuneRecipe, checkpoint: str, *, vocabulary: str | None = None, mesh: Mesh | None = None, verify: bool = True,
    changes: Mapping[str, Any] | None = None, **loading: Any,
) -> tuple[Run, dict[str, Any], list[Prediction]]:  # fmt: skip
    """Returns (the run, metrics by name, predictions) of a checkpoint on the validation examples of the recipe's tasks.

    changes: of the checkpoint's config, beside the recipe's. loading: `experts`, `expert_memory`, `kernels`, `adapter` of
    `load_pretrained`. With several processes every one of them makes this call, and has the same metrics and predictions.
    """
    console.quiet = jax.process_index() != 0
    recipe = recipe.replace(adapter=AdapterConfig(), optimizer=FinetuneOptimizerConfig())  # nothing is trained
    changed = {**recipe.model, **(changes or {})}
    loading = {"kernels": "auto", **loading}
    start = processes.first_process_first(lambda: open_start(checkpoint, changed, vocabulary, verify, loading))
    config = recipe.resolve(start.config, checkpoint)
    _require_same(config, start, loading=str(loading))
    mesh = _checked(config, mesh)
    check_vocabulary(config, start.vocabulary)
    prepared = _prepared(config, start, train=False)
    check(prepared.num_validation > 0, "There is nothing to evaluate on; name a validation or test file with data.validation=FILE.")
    run = build_run(config, mesh)
    params = start.params(run)
    step = compile_eval_step(run, placed=has_adapter(params) or config.model.weights != "float")
    found, reads = run_reading(params, lambda: evaluate(run, prepared, step, params))
    if reads is not None:
        console.print(str(reads))
    return run, *found


def _require_same(config: FinetuneConfig, start: Start, **values: Any) -> None:
    """Raises `ConfigError` where processes were started with other settings, checkpoints or vocabularies."""
    values |= {"jax": jax.__version__, "vocabulary (by hash)": start.vocabulary.fingerprint}
    processes.require_same({**values, **flat_fields(config)})


def _prepared(config: FinetuneConfig, start: Start, train: bool = True) -> PreparedTasks:
    """Reads the tasks' examples in each process; raises `ConfigError` where they differ."""
    read = lambda: prepare_tasks(config.data, start.vocabulary, train=train, say=console.print, model=config.model)  # noqa: E731
    prepared = processes.first_process_first(read)
    processes.require_same({"the tasks' examples (by hash)": prepared.fingerprint})
    return prepared


def _checked(config: FinetuneConfig, mesh: Mesh | None) -> Mesh:
    """Returns the mesh; raises for metrics that are not installed and a batch that the mesh cannot split."""
    scores.require(dict.fromkeys(m for task in config.data.mixture for m in config.metrics_of(task)))
    mesh = create_mesh(config.mesh) if mesh is None else mesh
    check_batch_size(config.data.batch_size, mesh)
    return mesh


def recipe_of(config: FinetuneConfig) -> FinetuneRecipe:
    """Returns the recipe that makes this config of its checkpoint, which has the model's settings already."""
    sections = {name: getattr(config, name) for name in ("data", "optimizer", "mesh", "train", "evaluation", "adapter")}
    head = {} if config.model.head == LANGUAGE_MODEL else {"head": config.model.head, "labels": config.model.labels}
    return FinetuneRecipe(model=head, **sections)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
