"""One step of training and one of evaluation: the only place where losses meet gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_switch.config import ExperimentConfig, SwitchConfig
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.nn.outputs import ModelOutput
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.kernels.head_loss import Terms, head_loss
from flax_switch.ops.kernels.updates import update_if
from flax_switch.ops.losses import IGNORED_LABEL, LossOutput, loss_weights, seq2seq_loss
from flax_switch.ops.moe.groups import rows_of_whole_groups
from flax_switch.ops.task_losses import task_loss
from flax_switch.parallel.mesh import AnyMesh, batch_sharding, replicated
from flax_switch.training.freezing import merged, trainable_part
from flax_switch.training.optimizer import global_norm, learning_rate_schedule
from flax_switch.training.rounding import apply_rounded
from flax_switch.training.state import Run, TrainState, is_split, state_shardings

Batch = dict[str, jax.Array]
Loss = Callable[[ModelOutput, Batch, jax.Array], LossOutput]  # of the model's output on a batch, and what sums are divided by


def forward(model: SwitchEncoder, params: Any, batch: Batch, rng: jax.Array | None) -> ModelOutput:
    """Runs the model on a batch; with `rng` in training mode (dropout, jitter, training capacity), without in evaluation mode.

    A language model's output has no logits, but the `head` that makes them.
    """
    rngs: dict[str, Any] = {} if rng is None else dict(zip(("dropout", "jitter"), jax.random.split(rng), strict=True))
    if model.config.head != LANGUAGE_MODEL:
        ids, mask = two_texts(batch) if model.config.head == "embedding" else (batch["input_ids"], batch["attention_mask"])
        said: Any = model.apply({"params": params}, ids, mask, deterministic=rng is None, rngs=rngs)
        return said
    output: Any = model.apply(
        {"params": params},
        batch.get("input_ids"),
        batch["decoder_input_ids"],
        batch.get("attention_mask"),
        batch["decoder_attention_mask"],
        prefix_mask=batch["prefix_mask"] if model.config.bidirectional_inputs else None,
        segment_ids=batch.get("input_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        deterministic=rng is None,
        output_logits=False,
        rngs=rngs,
    )
    return output


def two_texts(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns ids and mask [2B, L] of a batch of pairs of texts: of each row its inputs, then its targets."""
    targets = batch["labels"]
    texts = ((batch["input_ids"], batch["attention_mask"]), (jnp.maximum(targets, 0), (targets != IGNORED_LABEL).astype(jnp.int32)))
    length = max(ids.shape[1] for ids, _ in texts)
    padded = [[jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in pair] for pair in texts]
    ids, mask = (jnp.stack(pair, axis=1).reshape(-1, length) for pair in zip(*padded, strict=True))
    return ids, mask


def true_loss(config: SwitchConfig) -> Loss:
    """Returns the loss against a batch's labels."""

    def loss_of(output: ModelOutput, batch: Batch, divisor: jax.Array) -> LossOutput:
        if config.head != LANGUAGE_MODEL:
            return task_loss(output, batch["labels"], config, divisor=divisor)
        return seq2seq_loss(output, batch["labels"], config, segment_ids=batch.get("decoder_segment_ids"), divisor=divisor)

    return loss_of


def loss_and_grads(run: Run, params: Any, batch: Batch, rng: jax.Array, loss_of: Loss | None = None) -> tuple[Any, dict[str, Any]]:
    """Gradients of the trained parameters and metrics of a batch, in one piece or in `train.microbatches` pieces with the same sum.

    Each piece divides its cross-entropy by the whole batch's normaliser and its routers' losses by the number of pieces, so that
    splitting changes memory and not the update (where routing groups lie within a piece, and but for dropout's draws). Where each
    device has a part of the batch, these are such pieces too, and what is returned is their mean. `loss_of` is `true_loss` where
    none is given.
    """
    config = run.config.model
    loss_of = loss_of or true_loss(config)
    pieces = run.config.train.microbatches
    labels, segments = batch["labels"], batch.get("decoder_segment_ids")
    _, divisor = loss_weights((labels != IGNORED_LABEL).astype(jnp.float32), config.loss_normalizer, segments)
    devices = run.model.devices  # a constant is the whole batch's; other normalisers have counted this device's part
    divisor = devices.mean(divisor) if isinstance(config.loss_normalizer, str) else divisor / devices.size
    trained = trainable_part(params, run.config.optimizer.trainable)

    def loss_fn(trained, piece, rng):
        output = forward(run.model, run.for_model(merged(params, trained), rng), piece, rng)
        loss = loss_of(output, piece, divisor * (1 / pieces))
        return loss.loss, (loss, router_metrics(output))

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if pieces == 1:
        grads, (loss, routers) = grad_fn(trained, batch, rng)
        return _over_devices(run, grads, _metrics(loss, routers))

    def accumulate(total, inputs):
        piece, i = inputs
        grads, aux = grad_fn(trained, piece, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, grads), aux

    # Piece m takes blocks m, m + pieces, ... of rows, so that devices cut their own rows; a block holds whole routing groups.
    lengths = [batch[name].shape[1] for name in ("input_ids", "labels") if name in batch]
    block = rows_of_whole_groups(config, labels.shape[0], pieces, *lengths)
    split = {k: x.reshape(-1, pieces, block, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}
    split = {k: x.reshape(pieces, -1, *x.shape[3:]) for k, x in split.items()}
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    grads, aux = jax.lax.scan(accumulate, zeros, (split, jnp.arange(pieces)))
    grads = jax.tree.map(lambda g: g / pieces, grads)
    loss, routers = jax.tree.map(lambda x: x.mean(0), aux)
    return _over_devices(run, grads, _metrics(dataclasses.replace(loss, weight_sum=loss.weight_sum * pieces), routers))


def _over_devices(run: Run, grads: Any, metrics: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the means over the devices; of an expert's gradients, which hold every peer's, over its replicas only."""
    devices = run.model.devices

    def mean(grad, leaf):
        return devices.mean_of_experts(grad) if is_split(leaf) else devices.mean(grad)

    grads = jax.tree.map(mean, grads, trained_leaves(run))
    return grads, {**devices.mean(metrics), "target_tokens": devices.sum(metrics["target_tokens"])}


def trained_leaves(run: Run) -> Any:
    """Shapes and shardings of the parameters that are trained."""
    return trainable_part(run.abstract_state.params, run.config.optimizer.trainable)


def train_step(run: Run, state: TrainState, batch: Batch, loss_of: Loss | None = None) -> tuple[TrainState, dict[str, Any]]:
    """Makes one update, of `true_loss` where no other loss is given; `state.step` counts it.

    Where the loss or the norm of the gradients is not finite, parameters and the optimiser's state, its place in the schedule
    included, stay as they are, and "skipped" is 1 in the metrics.
    """
    devices = run.model.devices
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    rng = devices.own_key(key)
    grads, metrics = loss_and_grads(run, state.params, batch, rng, loss_of)
    trained = trainable_part(state.params, run.config.optimizer.trainable)
    norm = global_norm(grads, jax.tree.map(is_split, trained_leaves(run)), devices)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    def update(old, grads, norm):
        trained, opt_state = old
        updates, opt_state = run.optimizer.update(grads, opt_state, trained, norm=norm)
        if run.config.optimizer.stochastic_rounding:
            return apply_rounded(trained, updates, key), opt_state  # the same on devices that hold the same
        return optax.apply_updates(trained, updates), opt_state

    trained, opt_state = update_if(finite, update, (trained, state.opt_state), grads, norm)
    params = merged(state.params, trained)
    schedule = learning_rate_schedule(run.config.optimizer, run.config.train.steps)
    metrics["grad_norm"] = norm
    metrics["skipped"] = 1.0 - finite
    metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def eval_step(run: Run, params: Any, batch: Batch) -> dict[str, Any]:
    """Sums over a batch, to be divided at the end: cross-entropy and hits over all targets and over text targets alone.

    `batch["text_mask"]` marks the targets that are text, neither sentinel nor EOS.
    With the head of a task its loss and how many labels it is of, and the head's `logits`.
    """
    output = forward(run.model, run.for_model(params), batch, None)
    labels = batch["labels"]
    if run.config.model.head != LANGUAGE_MODEL:
        loss = task_loss(output, labels, run.config.model.replace(loss_normalizer="real_target_tokens"))
        sums = {"cross_entropy": loss.cross_entropy * loss.weight_sum, "tokens": loss.weight_sum}
        return {**sums, "logits": output.logits, "routers": router_metrics(output)}
    counted = (labels != IGNORED_LABEL).astype(jnp.float32)
    targets = jnp.maximum(labels, 0)
    assert output.head is not None  # a model that is trained has its head
    losses = head_loss(output.head, targets, counted, Terms(with_hits=True))
    assert losses.hits is not None  # asked for
    text = counted * batch["text_mask"]
    return {
        "cross_entropy": (losses.cross_entropy * counted).sum(),
        "hits": (losses.hits * counted).sum(),
        "tokens": counted.sum(),
        "text_cross_entropy": (losses.cross_entropy * text).sum(),
        "text_tokens": text.sum(),
        "routers": router_metrics(output),
    }


def router_metrics(output: ModelOutput) -> dict[str, jax.Array]:
    """Returns the routing metrics of every sparse layer, encoder first, stacked on a leading axis; empty for a dense model."""
    routers = (*output.encoder_router, *output.decoder_router)
    if not routers:
        return {}
    metrics = [{**r.metrics, "load_balancing_loss": r.load_balancing_loss, "router_z_loss": r.z_loss} for r in routers]
    return jax.tree.map(lambda *layers: jnp.stack(layers), *metrics)


def _metrics(loss: LossOutput, routers: dict[str, jax.Array]) -> dict[str, Any]:
    return {
        "loss": loss.loss,
        "cross_entropy": loss.cross_entropy,
        "z_loss": loss.z_loss,
        "load_balancing_loss": loss.load_balancing_loss,
        "router_z_loss": loss.router_z_loss,
        "target_tokens": loss.weight_sum,
        "routers": routers,
    }


def abstract_batch(config: ExperimentConfig, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the batch that a train step takes, as shapes with shardings."""
    sharding, rows = batch_sharding(mesh), config.data.batch_size
    lengths = config.data.array_lengths.items()
    return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding) for name, length in lengths}


def compile_train_step(run: Run) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """`train_step` jitted over the run's mesh; the old state's memory is reused."""
    shardings = state_shardings(run)
    return jax.jit(
        functools.partial(train_step, run),
        in_shardings=(shardings, batch_sharding(run.mesh)),
        out_shardings=(shardings, replicated(run.mesh)),
        donate_argnums=0,
    )


def compile_eval_step(run: Run, *, placed: bool = False) -> Callable[[Any, Batch], dict[str, Any]]:
    """`eval_step` jitted over the run's mesh. placed: parameters lie where they do, and not as in training."""
    return jax.jit(
        functools.partial(eval_step, run),
        in_shardings=(None if placed else state_shardings(run).params, batch_sharding(run.mesh)),
        out_shardings=replicated(run.mesh),
    )
