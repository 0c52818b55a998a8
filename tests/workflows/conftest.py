"""A small model with its vocabulary, and a task that can be learnt: name the first word of a list."""

import json

import jax
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.data import Vocabulary
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import save_pretrained

WORDS = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu"]


def lists(count, seed=0):
    """(list of words, its first word)."""
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(WORDS, rng.integers(2, 5)).tolist() for _ in range(count)]
    return [(" ".join(words), words[0]) for words in drawn]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def vocabulary():
    texts = [text for text, _ in lists(300)] + ["first: " + text for text, _ in lists(100)]
    return Vocabulary.train(texts, 28, num_sentinels=4)


@pytest.fixture(scope="session")
def checkpoint(vocabulary, tmp_path_factory):
    """A folder that `load_pretrained` opens."""
    config = SwitchConfig(
        vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, dropout_rate=0.0, init_scale=1.0,
    )  # fmt: skip
    params = init_params(SwitchTransformer(config), jax.random.key(0))
    return str(save_pretrained(tmp_path_factory.mktemp("checkpoint") / "model", config, params, vocabulary, "flax_switch"))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("lists")
    for name, rows in (("train", lists(80)), ("validation", lists(6, seed=1))):
        write_jsonl(folder / f"{name}.jsonl", [{"list": text, "first": word} for text, word in rows])
    return folder


@pytest.fixture(scope="session")
def recipe(files):
    return FinetuneRecipe(
        data=FinetuneDataConfig(
            train=str(files / "train.jsonl"), validation=str(files / "validation.jsonl"), inputs="list", targets="first",
            prefix="first: ", inputs_length=16, targets_length=4, batch_size=8,
        ),
        optimizer=FinetuneOptimizerConfig(name="adamw", learning_rate=1e-2),
        train=FinetuneTrainConfig(steps=4, log_every=1, eval_every=2, eval_batches=1, checkpoint_every=2, sample_spans=2),
        evaluation=EvaluationConfig(metrics=("accuracy",), batch_size=8, num_beams=1),
    )  # fmt: skip


@pytest.fixture(scope="session")
def mesh(recipe):
    """One device."""
    return create_mesh(recipe.mesh, jax.devices()[:1])
