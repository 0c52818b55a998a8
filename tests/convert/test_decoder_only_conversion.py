"""Decoders without an encoder in T5X's files: the config by the shapes, every bit, and the logits that flaxformer has."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.config.sizes import count_parameters
from flax_switch.convert.canonical import canonical_shapes, flatten
from flax_switch.convert.checkpoint import open_checkpoint
from flax_switch.convert.scan import stack_layers
from flax_switch.convert.tensors import CheckpointError
from flax_switch.convert.upcycle import upcycle
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import load_pretrained, save_pretrained

from . import t5x_files

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("t5_dense_relu", "t5_sparse_relu", "fused_dense_swiglu_rotary", "fused_sparse_relu_relative")
BASE = SwitchConfig(
    architecture="decoder_only", vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=12, num_decoder_layers=4,
    num_sparse_decoder_layers=2, num_experts=3,
)  # fmt: skip
GATED = ("gelu_new", "linear")
CONFIGS = {
    "sequential": BASE.replace(extra_mlp=True, shared_expert=True, router_bias=True, mlp_activations=GATED),
    "parallel": BASE.replace(layer_form="parallel", tie_word_embeddings=False, relative_attention_per_layer=True),
    "parallel, rotary, hash": BASE.replace(layer_form="parallel", positions="rotary", router_type="hash", extra_mlp=True),
    "fused": BASE.replace(layer_form="fused", router_bias=True, fused_sparse=("q_wi", "kv", "o_wo")),
    "fused, gated, rotary": BASE.replace(
        layer_form="fused", mlp_activations=("swish", "linear"), positions="rotary", scale_attention_logits=True,
        fused_sparse=("kv",), tie_word_embeddings=False,
    ),
    "fused, hash": BASE.replace(layer_form="fused", router_type="hash"),
}  # fmt: skip
INFERRED = ("sequential", "parallel", "fused", "fused, gated, rotary")  # whose fields shapes tell


@pytest.mark.parametrize("name", NAMES)
def test_flaxformers_tree_loads_and_says_what_flaxformer_says(name, tmp_path):
    golden = dict(np.load(GOLDENS / f"decoder_only_{name}.npz"))
    params = {path.removeprefix("param/"): array for path, array in golden.items() if path.startswith("param/")}
    tree = json.loads((GOLDENS / f"param_tree_decoder_only_{name}.json").read_text())
    assert {path: list(array.shape) for path, array in params.items()} == {path: leaf["shape"] for path, leaf in tree.items()}
    t5x_files.write(tmp_path, params)
    told = dict(capacity_mode="dropless") | (dict(relative_attention_max_distance=16) if "rotary" not in name else {})
    model = load_pretrained(tmp_path, **told)
    assert flatten(model.params).keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, flatten(model.params), params)
    tokens, lengths = golden["step/tokens"], golden["step/lengths"]
    real = np.arange(12) < lengths[:, None]
    logits = model(tokens, real.astype(np.int32)).logits
    np.testing.assert_allclose(np.asarray(logits)[real], golden["step/causal/full"][real], atol=1e-5)


@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("name", INFERRED)
def test_shapes_tell_the_config_and_every_bit_is_kept(name, scanned, tmp_path):
    config, draw = CONFIGS[name], np.random.default_rng(0)
    params = {path: draw.normal(size=shape).astype(np.float32) for path, shape in canonical_shapes(config).items()}
    t5x_files.write(tmp_path, stack_layers(params, config) if scanned else params)
    opened = open_checkpoint(tmp_path)
    assert opened.config == config
    assert {path: tensor.shape for path, tensor in opened.tensors.items()} == canonical_shapes(config)
    for path, tensor in opened.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), params[path])


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_counts_are_those_of_the_model(name):
    config = CONFIGS[name]
    params = flatten(init_params(config, jax.random.key(0)))
    assert {path: leaf.shape for path, leaf in params.items()} == canonical_shapes(config)
    count = count_parameters(config)
    assert count.total == sum(leaf.size for leaf in params.values())
    experts = sum(leaf.size for path, leaf in params.items() if "/expert/" in path)
    assert count.active == count.total - experts + experts * config.num_selected_experts // config.num_experts


def test_what_is_neither_is_refused_with_its_names(tmp_path):
    params = {
        "decoder/token_embedder/embedding": np.zeros((32, 8), np.float32),
        "decoder/layers_0/kv_fused/kernel": np.zeros((8, 1, 8)),
    }
    t5x_files.write(tmp_path, params)
    with pytest.raises(CheckpointError, match="q_wi_fused"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["sequential", "fused"])
def test_a_dense_decoder_is_upcycled_to_copies_of_its_own(form, tmp_path):
    config = BASE.replace(layer_form=form, num_sparse_decoder_layers=0)
    params = init_params(config, jax.random.key(0))
    save_pretrained(tmp_path / "dense", config, params, format="flax_switch")
    upcycle(
        tmp_path / "dense",
        tmp_path / "sparse",
        num_experts=3,
        changes=dict(capacity_mode="dropless", normalize_router_weights=True),
    )
    sparse = load_pretrained(tmp_path / "sparse")
    assert sparse.config.decoder.sparse_layers == (1, 3)
    ids = jnp.arange(12).reshape(2, 6) + 3
    expected = SwitchTransformer(config).apply({"params": params}, ids).logits
    np.testing.assert_allclose(sparse(ids).logits, expected, atol=1e-5)  # with weights that sum to 1 copies say what one says
