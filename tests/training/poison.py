"""Batches whose loss is no number: at chosen steps a target gets an id that the loss is made to stumble over."""

import dataclasses
import math

import jax.numpy as jnp

from flax_switch.data.pipeline import Prepared
from flax_switch.training import step as step_module

BAD = 1  # as a target's first id: the end of a text that is empty, which no batch has


def poison_loss(monkeypatch):
    """The loss of a batch, or of the part of it that a device or a micro-batch has, is NaN where a target begins with `BAD`."""
    true_loss = step_module.true_loss

    def poisoned(config):
        loss = true_loss(config)

        def loss_of(output, batch, divisor):
            value = loss(output, batch, divisor)
            bad = (batch["labels"][:, 0] == BAD).any()
            return dataclasses.replace(value, loss=value.loss * jnp.where(bad, math.nan, 1.0))

        return loss_of

    monkeypatch.setattr(step_module, "true_loss", poisoned)


class Poisoned:
    """A training iterator whose batches at some steps (from 1 on) have such a target in their last row."""

    def __init__(self, batches, steps):
        self._batches, self._steps = batches, steps

    def __next__(self):
        step = self._batches.get_state()["next_batch"] + 1
        batch = next(self._batches)
        assert not (batch["labels"][:, 0] == BAD).any()
        if step in self._steps:
            batch = {**batch, "labels": batch["labels"].copy()}
            batch["labels"][-1, 0] = BAD
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def poison_steps(monkeypatch, *steps):
    """Poisons these steps of every pre-training."""
    poison_loss(monkeypatch)
    train_iterator = Prepared.train_iterator
    monkeypatch.setattr(Prepared, "train_iterator", lambda self, *rows: Poisoned(train_iterator(self, *rows), steps))
