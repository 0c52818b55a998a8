"""An upcycled model computes what the dense one did, up to the router's weight."""

import jax
import numpy as np
import pytest

from flax_switch import ConfigError, SwitchConfig, load_pretrained, save_pretrained
from flax_switch.convert import open_checkpoint
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.upcycle import upcycle
from flax_switch.nn.layers import MLP
from flax_switch.nn.moe import SparseMLP

DENSE = SwitchConfig(
    vocab_size=40, d_model=16, num_heads=2, d_kv=8, d_ff=24, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False,
)  # fmt: skip


def random_params(config: SwitchConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in canonical_shapes(config).items()}


@pytest.fixture
def dense(tmp_path):
    save_pretrained(tmp_path / "dense", DENSE, random_params(DENSE), format="flax_switch")
    return tmp_path / "dense"


IDS = dict(
    input_ids=np.random.default_rng(1).integers(2, 40, (2, 9)), decoder_input_ids=np.random.default_rng(2).integers(2, 40, (2, 6))
)


def test_with_normalised_weights_and_ample_capacity_the_logits_are_the_dense_models(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", num_experts=4, changes={"normalize_router_weights": True, "capacity_mode": "dropless"})
    sparse = load_pretrained(tmp_path / "sparse")
    assert sparse.config.encoder.sparse_layers == (1,) and sparse.config.num_experts == 4
    np.testing.assert_allclose(sparse(**IDS).logits, load_pretrained(dense)(**IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_sparse_layers_output_is_the_dense_mlps_times_the_routers_weight(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", num_experts=4, changes={"capacity_mode": "dropless"})
    sparse, original = load_pretrained(tmp_path / "sparse"), load_pretrained(dense)
    layer, mlp = (model.params["encoder"]["layers_1"]["mlp"] for model in (sparse, original))

    @jax.jit
    def both(x):
        y, _ = SparseMLP(sparse.config).apply({"params": layer}, x, padding_mask=None, deterministic=True)
        weight = jax.nn.softmax(x @ layer["router"]["router_weights"]["w"]["kernel"]).max(-1, keepdims=True)
        return y, weight * MLP(DENSE).apply({"params": mlp}, x, deterministic=True)

    y, expected = both(np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32))
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)


def test_with_a_router_of_zeros_the_logits_are_those_of_the_dense_model_with_its_mlp_divided_by_the_experts(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", num_experts=4, changes={"capacity_mode": "dropless"})
    sparse, original = load_pretrained(tmp_path / "sparse"), load_pretrained(dense)
    for stack in ("encoder", "decoder"):
        router = sparse.params[stack]["layers_1"]["mlp"]["router"]["router_weights"]["w"]
        router["kernel"] *= 0
        original.params[stack]["layers_1"]["mlp"]["wo"]["kernel"] /= 4  # every weight is 1/E
    np.testing.assert_allclose(sparse(**IDS).logits, original(**IDS).logits, atol=1e-4, rtol=1e-4)


def test_experts_are_bitwise_copies_and_noise_is_reproducible_and_of_the_size_asked_for(dense, tmp_path):
    kernel = open_checkpoint(dense).tensors["encoder/layers_1/mlp/wi_0/kernel"].numpy()
    upcycle(dense, tmp_path / "copies", num_experts=3)
    copies = open_checkpoint(tmp_path / "copies").tensors["encoder/layers_1/mlp/expert/wi_0/kernel"].numpy()
    np.testing.assert_array_equal(copies, np.stack([kernel] * 3))
    noisy = []
    for name, experts in (("noisy", 3), ("again", 5)):
        upcycle(dense, tmp_path / name, num_experts=experts, noise=0.1, max_shard_size="1KB")
        noisy.append(open_checkpoint(tmp_path / name).tensors["encoder/layers_1/mlp/expert/wi_0/kernel"].numpy())
    np.testing.assert_array_equal(noisy[0], noisy[1][:3])  # an expert's noise depends on its number, not on how many there are
    difference = noisy[0] - kernel
    assert difference.std() == pytest.approx(0.1 * kernel.std(), rel=0.15)
    assert abs(np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]) < 0.15


def test_a_fresh_router_is_small_float32_and_differs_from_layer_to_layer(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", num_experts=64, sparse_layout="top", num_sparse_encoder_layers=2)
    tensors = open_checkpoint(tmp_path / "sparse").tensors
    routers = [tensors[f"encoder/layers_{i}/mlp/router/router_weights/w/kernel"].numpy() for i in (0, 1)]
    assert routers[0].dtype == np.float32 and routers[0].std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(*routers)


def test_a_dense_t5_from_hugging_face_upcycles_into_a_switch_transformer_that_opens_there(tmp_path):
    import transformers

    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    upcycle(tmp_path / "t5", tmp_path / "switch", num_experts=3, to="huggingface")
    sparse = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "switch")
    for expert in sparse.encoder.block[1].layer[1].mlp.experts.values():
        np.testing.assert_array_equal(expert.wi.weight.detach(), model.encoder.block[1].layer[1].DenseReluDense.wi.weight.detach())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"changes": {"expert_d_ff": 8}}, "expert_d_ff"),
        ({"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}, "no layer would become sparse"),
        ({"changes": {"shared_expert": True}}, "shared_expert"),
        ({"noise": -1.0}, "noise"),
        ({"sparse_layout": "mixd"}, "mixed"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(dense, tmp_path, fields, words):
    with pytest.raises(ConfigError, match=words):
        upcycle(dense, tmp_path / "sparse", **{"num_experts": 3, **fields})
    assert not (tmp_path / "sparse").exists()


def test_a_sparse_model_is_not_upcycled_again(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", num_experts=3)
    with pytest.raises(ConfigError, match="sparse already"):
        upcycle(tmp_path / "sparse", tmp_path / "more", num_experts=3)
