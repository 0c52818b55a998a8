"""Ids and labels outside the vocabulary are refused wherever they have values, and cost nothing where they have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.layers import Embedding
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.pretrained import Pretrained

CONFIG = SwitchConfig(
    vocab_size=16, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=1, num_decoder_layers=1, num_experts=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0,
)  # fmt: skip
MODEL = SwitchTransformer(CONFIG)
PARAMS = init_params(MODEL, jax.random.key(0))
PRETRAINED = Pretrained(CONFIG, MODEL, PARAMS)
GOOD = np.array([[3, 15, 1]])
outside = pytest.mark.parametrize("bad", [16, -1, -100, 2**31 - 1])


def refused(name, bad):
    return pytest.raises(ConfigError, match=rf"{name} holds? {bad}, which is no id of the vocabulary of 16")


@outside
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_model_that_is_called_with_arrays_refuses_ids_outside(bad, kind):
    ids = kind(np.array([[3, bad, 1]], np.int32))
    for call in (
        lambda: MODEL.apply({"params": PARAMS}, ids, GOOD),
        lambda: MODEL.apply({"params": PARAMS}, GOOD, ids),
        lambda: SwitchEncoder(CONFIG).init(jax.random.key(0), ids),
        lambda: Embedding(CONFIG).apply({"params": PARAMS["token_embedder"]}, jnp.asarray(ids)),
    ):
        with refused("token ids", bad):
            call()


@outside
def test_a_pretrained_model_refuses_ids_outside_by_the_arguments_name(bad):
    ids = np.array([[3, bad, 1]], np.int32)
    with refused("input_ids", bad):
        PRETRAINED(ids, labels=GOOD)
    with refused("decoder_input_ids", bad):
        PRETRAINED(GOOD, decoder_input_ids=ids)
    with refused("input_ids", bad):
        PRETRAINED.encode(ids)
    with refused("input_ids", bad):
        PRETRAINED.generate(ids)
    with refused("decoder_input_ids", bad):
        PRETRAINED.generate(GOOD, decoder_input_ids=ids)


@pytest.mark.parametrize("bad", [16, -1, -99])
def test_labels_outside_are_refused_and_the_ignored_label_is_none_of_them(bad):
    assert np.isfinite(PRETRAINED(GOOD, labels=np.array([[3, -100, 1]])).loss)
    labels = np.array([[3, bad, 1]])
    with refused("labels", bad):
        PRETRAINED(GOOD, labels=labels)
    output = MODEL.apply({"params": PARAMS}, GOOD, GOOD)
    with refused("labels", bad):
        seq2seq_loss(output, labels, CONFIG)


def test_under_jit_nothing_is_checked_and_nothing_computed_for_it():
    def loss(ids, labels):
        return seq2seq_loss(MODEL.apply({"params": PARAMS}, ids, ids), labels, CONFIG).loss

    text = jax.jit(loss).lower(GOOD, GOOD).as_text()
    assert "callback" not in text
    jax.jit(loss)(np.array([[99]]), np.array([[3]]))
