"""Held-out means: what is counted, and ids that the model has not, which XLA would clip to others."""

import inspect
import types

import numpy as np
import pytest

from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.evaluate import mean_metrics

VOCABULARY = types.SimpleNamespace(num_pieces=10, eos_id=1)
mean = inspect.unwrap(mean_metrics)  # the stand-ins are not of the types that tests check


def batch_of(**changed):
    names = ("input_ids", "decoder_input_ids", "labels")
    return {name: np.full((8, 4), 5, np.int32) for name in names} | {
        name: np.full((8, 4), id, np.int32) for name, id in changed.items()
    }


def run_of(vocab_size=20):
    config = ExperimentConfig()
    config = config.replace(model=config.model.replace(vocab_size=vocab_size))
    return types.SimpleNamespace(config=config, mesh=create_mesh(config.mesh))


def counted(params, batch):
    """Each of `params` targets costs as much as its label."""
    labels = np.asarray(batch["labels"])
    text = np.asarray(batch["text_mask"])
    sums = {"cross_entropy": labels.sum(), "hits": (labels == 5).sum(), "tokens": labels.size}
    return {name: float(value) for name, value in sums.items()} | {
        "text_cross_entropy": float((labels * text).sum()), "text_tokens": float(text.sum()),
        "routers/entropy": np.array([labels.mean()]),
    }  # fmt: skip


def test_means_are_over_tokens_and_routers_over_batches():
    found = mean(run_of(), counted, None, [batch_of(), batch_of(labels=7), batch_of(labels=12)], VOCABULARY)
    assert found["cross_entropy"] == pytest.approx(8.0) and found["accuracy"] == pytest.approx(1 / 3)
    assert found["text_cross_entropy"] == pytest.approx(6.0)  # 12 is a sentinel
    assert found["routers/entropy"] == [pytest.approx(8.0)] and found["perplexity"] == pytest.approx(np.exp(8.0))


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids", "labels"])
@pytest.mark.parametrize("id", [20, -1])
def test_an_id_that_is_none_of_the_models_is_refused_by_name(name, id):
    with pytest.raises(ConfigError, match=f"{name} holds {id}, which is no id of the vocabulary of 20"):
        mean(run_of(), counted, None, [batch_of(**{name: id})], VOCABULARY)


def test_a_label_that_does_not_count_is_no_id_and_passes():
    assert mean(run_of(), counted, None, [batch_of(labels=-100)], VOCABULARY)["text_cross_entropy"] == 0.0
