"""Distillation without its teacher in memory: its probabilities are computed once, kept, and read by any number of runs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from flax_switch.config import check
from flax_switch.config.distillation import DistillConfig
from flax_switch.convert.checkpoint import Checkpoint
from flax_switch.data import Prepared
from flax_switch.data.cached_teacher import BYTES_AT_ONCE, IDS, PROBS, CachedTeacher, Taught
from flax_switch.host.locks import locked
from flax_switch.nn.outputs import ModelOutput
from flax_switch.ops.kernels.head_loss import Known
from flax_switch.ops.losses import LossOutput, seq2seq_loss
from flax_switch.parallel import processes
from flax_switch.parallel.mesh import batch_rows, batch_sharding, replicated, shard_batch
from flax_switch.pretrained import Pretrained
from flax_switch.training.progress import console
from flax_switch.training.state import Run, state_shardings
from flax_switch.training.step import Batch, Loss, forward, train_step
from flax_switch.training.stepper import Stepper


def cached_teacher(run: Run, prepared: Prepared, checkpoint: Checkpoint, load: Callable[[], Pretrained]) -> Taught:
    """Returns the text with the teacher's probabilities beside it, of which it computes those that are not in the folder yet.

    load: the teacher, which is called for where something is to be computed. Raises `ConfigError` for a folder that is of another
    teacher, other data or settings.
    """
    config = run.config
    assert isinstance(config, DistillConfig) and config.distillation.cached_teacher is not None
    check(
        not config.data.streamed,
        "A cached teacher is of batches that can be made again: a stream's cannot. Leave data.streaming out, or "
        "distillation.cached_teacher.",
    )
    folder, identity = config.distillation.cached_teacher, _identity(config, prepared, checkpoint)
    cached = CachedTeacher(folder, identity)
    done = processes.from_first(cached.steps)
    if done < config.train.steps:
        if jax.process_index() == 0:
            Path(cached.folder).parent.mkdir(parents=True, exist_ok=True)
            with locked(cached.folder, what="caching of a teacher"):
                cached = CachedTeacher(folder, identity)
                _compute(run, prepared, load(), cached, done)
        else:
            _compute(run, prepared, load(), cached, done)
        processes.wait_for_all()
    return Taught.of(prepared, CachedTeacher(folder, identity))


def _identity(config: DistillConfig, prepared: Prepared, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what the probabilities depend on, each by a name that a message can use."""
    data = config.data
    return {
        "version": 1,
        "the teacher (by hash)": processes.from_first(_digest(checkpoint) if jax.process_index() == 0 else ""),
        "corpus, vocabulary and objectives (by hash)": prepared.fingerprint,
        **{f"data.{name}": getattr(data, name) for name in ("batch_size", "seed", "shuffle", "inputs_length", "targets_length")},
        "distillation.top_k": _top_k(config),
    }


def _top_k(config: DistillConfig) -> int:
    return min(config.distillation.top_k or config.model.vocab_size, config.model.vocab_size)


def _digest(checkpoint: Checkpoint) -> str:
    """Returns a hash of a checkpoint's config and of every tensor; reads all of it."""
    digest = hashlib.blake2b(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode(), digest_size=10)
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for block in tensor.blocks():
            digest.update(block.tobytes())
    return digest.hexdigest()


def _compute(run: Run, prepared: Prepared, teacher: Pretrained, cached: CachedTeacher, done: int) -> None:
    """Computes the batches from `done` on that the run takes; process 0 writes them."""
    config = run.config
    assert isinstance(config, DistillConfig)
    k, steps = _top_k(config), config.train.steps
    probabilities = jax.jit(lambda params, batch: most_probable(run, teacher, params, batch, k), out_shardings=replicated(run.mesh))
    length = config.data.array_lengths["labels"]
    at_once = max(BYTES_AT_ONCE // (8 * config.data.batch_size * length * k), 1)
    batches = prepared.train_iterator(batch_rows(run.mesh, config.data.batch_size))
    batches.set_state({**batches.get_state(), "next_batch": done})
    console.print(f"Computing the teacher's probabilities of batches {done} to {steps}, for {cached.folder}.")
    for first in range(done, steps, at_once):
        count = min(at_once, steps - first)
        found = [jax.device_get(probabilities(teacher.params, shard_batch(next(batches), run.mesh))) for _ in range(count)]
        if jax.process_index() == 0:
            cached.add(*(np.stack(arrays) for arrays in zip(*found, strict=True)))
    batches.close()


def most_probable(
    run: Run, teacher: Pretrained, params: Any, batch: Batch, k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """Returns the teacher's k most probable ids at each target, in evaluation mode, and their probabilities."""
    head = forward(teacher.model.clone(devices=run.model.devices), params, batch, None).head
    assert head is not None  # `check_teacher` has refused models without one
    probs, ids = jax.lax.top_k(jax.nn.softmax(head.logits()), k)
    return ids, probs


def loss_beside_cache(config: DistillConfig) -> Loss:
    """Makes the loss of a student's output on a batch that has its teacher's probabilities."""

    def loss_of(output: ModelOutput, batch: Batch, divisor: Array) -> LossOutput:
        return seq2seq_loss(
            output, batch["labels"], config.model, segment_ids=batch.get("decoder_segment_ids"), divisor=divisor,
            teacher=Known(batch[IDS], batch[PROBS]), teacher_weight=config.distillation.teacher_weight,
        )  # fmt: skip

    return loss_of


def cached_stepper(run: Run) -> Stepper:
    """Compiles `train_step` against a cached teacher, jitted over the run's mesh."""
    config = run.config
    assert isinstance(config, DistillConfig)
    shardings, loss_of = state_shardings(run), loss_beside_cache(config)
    compiled = jax.jit(
        lambda state, batch: train_step(run, state, batch, loss_of),
        in_shardings=(shardings, batch_sharding(run.mesh)),
        out_shardings=(shardings, replicated(run.mesh)),
        donate_argnums=0,
    )
    return Stepper(lambda state, batch: compiled(state, shard_batch(batch, run.mesh)))
