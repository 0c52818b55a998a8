"""Losses of tasks' heads against a few lines of numpy; labels that do not count have neither loss nor gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.nn.outputs import ModelOutput
from flax_switch.ops.task_losses import as_bits, task_loss

random = np.random.default_rng(0)
LEFT_OUT = -100


def config_of(head, **changes):
    return SwitchConfig(
        head=head,
        labels=("a", "b", "c") if "classification" in head else (),
        loss_normalizer="real_target_tokens",
        z_loss_coef=0.0,
        label_smoothing=0.0,
        **changes,
    )


def loss_and_gradient(head, logits, labels, **changes):
    def loss(logits):
        output = ModelOutput(logits=logits, decoder_last_hidden_state=None)
        return task_loss(output, jnp.asarray(labels), config_of(head, **changes)).loss

    return jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_a_regressions_loss_is_the_mean_square_of_what_it_is_off_by():
    predicted, wanted = random.normal(size=(2, 5, 1)).astype(np.float32)
    labels = np.array(as_bits(wanted))
    labels[3] = LEFT_OUT
    counted = np.arange(5) != 3
    loss, gradient = loss_and_gradient("regression", predicted, labels)
    assert loss == pytest.approx(np.square(predicted - wanted)[counted].mean(), rel=1e-6)
    np.testing.assert_allclose(gradient, np.where(counted[:, None], 2 * (predicted - wanted) / 4, 0), rtol=1e-5, atol=1e-7)


def test_several_classes_are_a_yes_or_no_each():
    logits, labels = random.normal(size=(4, 3)), random.integers(0, 2, (4, 3))
    labels[2, 1] = LEFT_OUT
    odds = 1 / (1 + np.exp(-logits))
    each = -np.where(labels == 1, np.log(odds), np.log(1 - odds))
    counted = labels != LEFT_OUT
    loss, gradient = loss_and_gradient("multi_label_classification", logits, labels)
    assert loss == pytest.approx(each[counted].mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, np.where(counted, odds - labels, 0) / counted.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("head", ["classification", "token_classification", "question_answering"])
def test_one_of_several_classes_costs_its_negative_log_probability(head):
    shape, places = {
        "classification": ((4, 3), (4, 1)), "token_classification": ((4, 5, 3), (4, 5)), "question_answering": ((4, 5, 2), (4, 2))
    }[head]  # fmt: skip
    logits, labels = random.normal(size=shape), random.integers(0, 3, places)
    labels[1, 0] = LEFT_OUT
    by_place = logits[:, None] if head == "classification" else logits
    by_place = by_place.swapaxes(1, 2) if head == "question_answering" else by_place
    chosen = np.take_along_axis(log_softmax(by_place), np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss, gradient = loss_and_gradient(head, logits, labels)
    assert loss == pytest.approx(-chosen[labels != LEFT_OUT].mean(), rel=1e-5)
    assert not np.asarray(gradient)[1].all() and np.asarray(gradient)[0].all()
