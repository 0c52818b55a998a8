"""Distillation (2101.03961, section 4.2): a dense student learns from the text and from a sparse teacher's probabilities.

The student starts from the teacher's weights wherever both have them, which is everywhere but in the layers of experts. Its targets
are a mixture of the true token and of the teacher's whole distribution, at temperature 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jaxtyping import Array

from flax_switch import data
from flax_switch.config import SwitchConfig, check
from flax_switch.config.distillation import DistillConfig
from flax_switch.convert.canonical import canonical_shapes, is_expert, is_router
from flax_switch.convert.checkpoint import Checkpoint, as_floats, open_checkpoint
from flax_switch.convert.tensors import LazyTensor
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.data import Vocabulary
from flax_switch.nn.outputs import ModelOutput
from flax_switch.ops.losses import LossOutput, seq2seq_loss
from flax_switch.parallel import processes
from flax_switch.parallel.mesh import batch_sharding, check_batch_size, create_mesh, replicated, shard_batch
from flax_switch.pretrained import Pretrained, from_checkpoint
from flax_switch.training.checkpoint import claim_workdir, flat_fields
from flax_switch.training.evaluate import Evaluator
from flax_switch.training.loop import check_vocabulary, given_back_if_refused, train
from flax_switch.training.progress import console
from flax_switch.training.state import Run, TrainState, build_run, init_state, state_shardings
from flax_switch.training.step import Batch, Loss, compile_eval_step, forward, train_step
from flax_switch.training.stepper import Stepper
from flax_switch.training.trackers import Tracker, require_trackers
from flax_switch.workflows.cached_teacher import cached_stepper, cached_teacher
from flax_switch.workflows.result import Result


def distill(
    config: DistillConfig, workdir: epath.PathLike, *, profile: int = 0, log: Sequence[Tracker] = (), verify: bool = True
) -> Result:
    """Trains a student of the teacher in `config.teacher`, in `workdir`; the same call continues a run that was stopped.

    The teacher is any checkpoint `load_pretrained` opens. Its parameters are laid out over the run's mesh, are never updated, and
    are not part of the run's checkpoints. Raises `ConfigError` for settings, data or a teacher that cannot be used, before anything
    is compiled. `verify`: compare checkpoints, the teacher's too, with their checksums before they are used. `profile` and `log`
    are as for `pretrain`, and so are several processes: every one of them makes this call.
    """
    console.quiet = jax.process_index() != 0
    processes.require_same({"workdir": str(workdir), "jax": jax.__version__, **flat_fields(config)})
    check(bool(config.teacher), "Distillation needs a teacher: a checkpoint that load_pretrained opens.")
    require_trackers(config.train.log_to)
    checkpoint = processes.first_process_first(lambda: open_checkpoint(config.teacher, verify=verify))
    check_teacher(config, checkpoint.config, checkpoint.architecture)
    copied = copied_weights(checkpoint, config.model) if config.distillation.copy_weights else {}
    check(config.mesh.mode == "jit", "Distillation runs under jit, on any number of devices; set mesh.mode='jit'.")
    mesh = create_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh)
    run = build_run(config, mesh)
    load, cached = lambda: from_checkpoint(checkpoint, mesh=mesh), config.distillation.cached_teacher is not None  # noqa: E731
    teacher = None if cached else load()
    with given_back_if_refused(workdir):
        workdir = processes.first_process_first(lambda: claim_workdir(workdir, config))
        vocabulary = shared_vocabulary(config, load_vocabulary(checkpoint.path))
        prepare = lambda: data.prepare(config.data, workdir=workdir, vocabulary=vocabulary, quiet=console.quiet)  # noqa: E731
        prepared = processes.first_process_first(prepare)
        processes.require_same({"corpus and vocabulary (by hash)": prepared.fingerprint})
        check_vocabulary(config, prepared.vocabulary)
        prepared = cached_teacher(run, prepared, checkpoint, load) if cached else prepared

    def first_state(run: Run) -> TrainState:
        if not copied:
            return init_state(run)
        student = dataclasses.replace(checkpoint, config=config.model, tensors=copied, huggingface=None)
        started = from_checkpoint(student, mesh=mesh, dtype=config.model.param_dtype, seed=config.train.seed)
        return init_state(run, started.params)

    result = train(
        run,
        prepared,
        workdir,
        lambda: Evaluator.of(run, prepared, compile_eval_step(run)),
        first_state,
        cached_stepper if teacher is None else lambda run: distillation_stepper(run, teacher),
        profile=profile,
        log=log,
        verify=verify,
    )
    return Result.of(result, workdir)


# --- teacher and student
def check_teacher(config: DistillConfig, teacher: SwitchConfig, architecture: str = "full") -> None:
    """Raises `ConfigError` unless the teacher gives probabilities over the student's own token ids."""
    check(
        architecture == "full",
        f"The teacher {config.teacher} is an {architecture} model: it gives no probabilities. Name one with its decoder and head.",
    )
    check(
        config.model.architecture == teacher.architecture,
        f"The teacher {config.teacher} has architecture={teacher.architecture!r}, the student {config.model.architecture!r}: they "
        f"do not read the same batches. Set model.architecture={teacher.architecture!r}.",
    )
    for name in ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        own, theirs = getattr(config.model, name), getattr(teacher, name)
        check(
            own == theirs,
            f"Teacher and student must have one vocabulary, token for token: {name} is {theirs} in {config.teacher} and {own} for "
            f"the student; set model.{name}={theirs}.",
        )


def shared_vocabulary(config: DistillConfig, vocabulary: Vocabulary | None) -> Vocabulary | None:
    """Returns the vocabulary of both: the teacher's; None, where its checkpoint has none, stands for what `config.data` says.

    Raises `ConfigError` where `config.data.vocabulary` names another one.
    """
    if vocabulary is None or config.data.vocabulary is None:
        return vocabulary
    own = Vocabulary.from_sentencepiece(config.data.vocabulary, config.data.num_sentinels)
    check(
        own.fingerprint == vocabulary.fingerprint,
        f"Teacher and student must have one vocabulary, token for token: data.vocabulary={config.data.vocabulary} has {own!r}, the "
        f"teacher {vocabulary!r}. Leave data.vocabulary out to take the teacher's.",
    )
    return vocabulary


def copied_weights(teacher: Checkpoint, student: SwitchConfig) -> dict[str, LazyTensor]:
    """Returns the teacher's tensors that a student starts from: all it has a place for but routers, experts and their MLPs.

    A student's layer is the teacher's layer of the same number. Raises `ConfigError` for a parameter, outside of the MLPs that
    are experts in the teacher, that the teacher lacks or has in another shape.
    """
    copied, tensors = {}, as_floats(teacher).tensors
    for path, shape in canonical_shapes(student).items():
        if is_expert(path) or is_router(path) or _is_sparse_mlp(path, teacher.config):
            continue
        tensor = tensors.get(path)
        check(
            tensor is not None and tuple(tensor.shape) == tuple(shape),
            f"The student's {path} has the shape {tuple(shape)}, the teacher's "
            f"{'does not exist' if tensor is None else f'has {tuple(tensor.shape)}'}, so it cannot start from it. Give the student "
            "the teacher's layers and sizes (model.d_model, num_heads, d_ff, ...), or set distillation.copy_weights=false.",
        )
        copied[path] = tensor
    return copied


def _is_sparse_mlp(path: str, teacher: SwitchConfig) -> bool:
    """Says whether a path lies in the MLP of a layer that is sparse in the teacher."""
    return any(
        path.startswith(f"{stack.name}/layers_{i}/{part}/")
        for stack in teacher.stacks
        for i in stack.sparse_layers
        for part in [f"{name}_fused" for name in stack.projections] or ["mlp"]
    )


# --- loss and step
def loss_beside_teacher(run: Run, teacher: Pretrained, params: Any) -> Loss:
    """Makes the loss of a student's output on a batch, whose targets the teacher gives in evaluation mode.

    Cross-entropy is linear in the targets, so a share of it against each of the two is that against their mixture.
    """
    config = run.config
    assert isinstance(config, DistillConfig)

    def loss_of(output: ModelOutput, batch: Batch, divisor: Array) -> LossOutput:
        taught = forward(teacher.model.clone(devices=run.model.devices), params, batch, None)
        assert taught.head is not None  # `check_teacher` has refused models without a head
        return seq2seq_loss(
            output,
            batch["labels"],
            config.model,
            segment_ids=batch.get("decoder_segment_ids"),
            divisor=divisor,
            teacher=taught.head,
            teacher_weight=config.distillation.teacher_weight,
        )

    return loss_of


def distillation_stepper(run: Run, teacher: Pretrained) -> Stepper:
    """Compiles `train_step` against the teacher, jitted over the run's mesh; the teacher's parameters stay where they are."""
    shardings = state_shardings(run)

    def step(params: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        return train_step(run, state, batch, loss_beside_teacher(run, teacher, params))

    compiled = jax.jit(
        step,
        in_shardings=(jax.tree.map(lambda leaf: leaf.sharding, teacher.params), shardings, batch_sharding(run.mesh)),
        out_shardings=(shardings, replicated(run.mesh)),
        donate_argnums=1,
    )
    return Stepper(lambda state, batch: compiled(teacher.params, state, shard_batch(batch, run.mesh)))
