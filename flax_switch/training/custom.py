"""The pieces of a training loop of one's own: an optimiser and a step, which makes the update that recipes' runs make."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_switch.config import ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, check, expect
from flax_switch.nn.heads import build_model
from flax_switch.nn.init import logical_axes
from flax_switch.nn.inputs import as_ids, as_mask, check_alive, shift_right
from flax_switch.ops.losses import IGNORED_LABEL
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training import step
from flax_switch.training.optimizer import build_optimizer
from flax_switch.training.state import Run, TrainState, build_run


def optimizer(config: SwitchConfig, steps: int = 10_000, **settings: Any) -> optax.GradientTransformation:
    """Returns an optimiser for a model's parameters, by default T5X's Adafactor; any other optax transformation does as well.

    Args:
      steps: of the whole training; what the schedules "linear" and "cosine" come down over.
      settings: fields of `OptimizerConfig`, such as name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=100.

    Raises:
      ConfigError: naming the setting that cannot be.
    """
    expect("config", config, SwitchConfig, "Arguments are optimizer(config, steps, **settings).")
    chosen = OptimizerConfig(**settings)
    check(
        chosen.trainable == ".*",
        "trainable is a setting of recipes; in a loop of your own, wrap the optimiser in optax.masked or optax.multi_transform.",
    )
    return build_optimizer(chosen, logical_axes(build_model(config)), steps)


def train_step(
    config: SwitchConfig, optimizer: optax.GradientTransformation, state: TrainState, batch: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Makes one update, compiled once for each shape of a batch; the given state is used up (its memory is the new one's).

    Args:
      state: from `TrainState.create`; dropout and jitter draw from its key and step.
      batch: `input_ids` [B, S] and `labels` [B, T] (-100 where there is no loss), and, unless what follows from them will do,
        `attention_mask`, `decoder_input_ids`, `decoder_attention_mask`. Lists and the arrays of any library. For a decoder-only
        model `labels` [B, L], the tokens that follow those of `decoder_input_ids` (by default the labels shifted right), and where
        config.bidirectional_inputs `prefix_mask`.

    Returns:
      The new state, and metrics: "loss" and its parts in nats, "target_tokens", "grad_norm", "routers" by sparse layer, and
      "skipped", which is 1 where the loss or the gradients were not finite and parameters so stayed as they were.

    Raises:
      ConfigError: naming what the batch lacks, or an input that cannot be.
    """
    expect("config", config, SwitchConfig, "Arguments are train_step(config, optimizer, state, batch).")
    check_alive("This state's parameters", state.params, "go on with the state that it returned")
    return _compiled(config, optimizer, state, complete(batch, config))


def complete(batch: Mapping[str, Any], config: SwitchConfig) -> dict[str, Any]:
    """Returns a batch as the model takes it: decoder inputs are the labels shifted right, masks leave padding out."""
    if config.decoder_only:
        return _complete_alone(batch, config)
    names = ("input_ids", "labels", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    unknown = [name for name in batch if name not in names]
    check(
        "input_ids" in batch and "labels" in batch and not unknown,
        f"A batch has input_ids and labels, and may have {', '.join(names[2:])}; this one has {', '.join(batch) or 'nothing'}.",
    )
    ids = as_ids("input_ids", batch["input_ids"], config)
    labels = as_ids("labels", batch["labels"], config, ignored=True)
    decoder_ids = batch.get("decoder_input_ids")
    decoder_ids = shift_right(labels, config) if decoder_ids is None else as_ids("decoder_input_ids", decoder_ids, config)
    check(
        ids.shape[0] == labels.shape[0] and decoder_ids.shape == labels.shape,
        f"input_ids {list(ids.shape)}, labels {list(labels.shape)} and decoder_input_ids {list(decoder_ids.shape)} must have the "
        "same number of rows, and the last two the same length.",
    )
    masks = {"attention_mask": (ids != config.pad_token_id, ids.shape, "input_ids")}
    masks["decoder_attention_mask"] = (labels != IGNORED_LABEL, labels.shape, "labels")
    given = {name: as_mask(name, batch[name], shape, of) for name, (_, shape, of) in masks.items() if batch.get(name) is not None}
    made = {name: given.get(name, default).astype(jnp.int32) for name, (default, _, _) in masks.items()}
    return {"input_ids": ids, "labels": labels, "decoder_input_ids": decoder_ids, **made}


def _complete_alone(batch: Mapping[str, Any], config: SwitchConfig) -> dict[str, Any]:
    """Returns a decoder-only model's batch as the model takes it."""
    names = ("labels", "decoder_input_ids", "decoder_attention_mask", "prefix_mask")
    check(
        "labels" in batch and all(name in names for name in batch),
        f"A decoder-only model's batch has labels, and may have {', '.join(names[1:])}; this one has "
        f"{', '.join(batch) or 'nothing'}.",
    )
    labels = as_ids("labels", batch["labels"], config, ignored=True)
    ids = shift_right(labels, config)
    if batch.get("decoder_input_ids") is not None:
        ids = as_ids("decoder_input_ids", batch["decoder_input_ids"], config)
    check(ids.shape == labels.shape, f"labels {list(labels.shape)} and decoder_input_ids {list(ids.shape)} must have one shape.")
    check(
        not config.bidirectional_inputs or batch.get("prefix_mask") is not None,
        "With bidirectional_inputs=True a batch needs prefix_mask: 1 at the start token and at inputs, 0 at targets.",
    )
    # Inputs have no loss, and so no label: that they are no padding only their ids tell, but of the start token, which is one.
    first = jnp.arange(labels.shape[1])[None] == 0
    real = {"decoder_attention_mask": (labels != IGNORED_LABEL) | (ids != config.pad_token_id) | first}
    for name in ("decoder_attention_mask", "prefix_mask"):
        if batch.get(name) is not None:
            real[name] = as_mask(name, batch[name], labels.shape, "labels")
    return {"labels": labels, "decoder_input_ids": ids, **{name: mask.astype(jnp.int32) for name, mask in real.items()}}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _compiled(
    config: SwitchConfig, optimizer: optax.GradientTransformation, state: TrainState, batch: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    run = dataclasses.replace(_run(config), optimizer=optax.with_extra_args_support(optimizer))
    state, metrics = step.train_step(run, state, batch)
    del metrics["learning_rate"]  # that of the run's own schedule, which is not used
    return state, metrics


@functools.cache
def _run(config: SwitchConfig) -> Run:
    """Returns what `step.train_step` asks of a run, for one device and all parameters."""
    return build_run(ExperimentConfig(model=config), create_mesh(MeshConfig(), jax.devices()[:1]))
