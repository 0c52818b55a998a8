"""Hash routing: a token's id alone says which expert takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import ROUTERS, ConfigError, SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.ops.moe import block
from flax_switch.ops.moe.hashing import expert_of_id, hash_logits

CONFIG = SwitchConfig(
    vocab_size=50, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, router_type="hash", capacity_mode="dropless",
)  # fmt: skip
SOURCE, TARGET = (jnp.asarray(np.random.default_rng(i).integers(2, 50, (3, 9))) for i in range(2))


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_params(SwitchTransformer(CONFIG), jax.random.key(0)))()


def test_every_router_of_a_config_has_a_row():
    assert tuple(block.ROUTERS) == ROUTERS


@pytest.mark.parametrize(("V", "E"), [(50, 4), (32128, 64), (7, 8), (5, 1)])
def test_experts_share_the_vocabulary_evenly(V, E):
    counts = np.bincount(expert_of_id(V, E, 0), minlength=E)
    assert counts.sum() == V and counts.max() - counts.min() <= 1


def test_the_assignment_is_fixed_by_the_seed_and_looks_random():
    assert expert_of_id(24, 4, 0).tolist() == [0, 1, 3, 2, 2, 3, 3, 1, 0, 2, 2, 3, 1, 0, 1, 0, 2, 0, 3, 1, 2, 3, 0, 1], (
        "a trained model's assignment may never change"
    )
    experts = np.stack([expert_of_id(32128, 8, seed) for seed in range(4)])
    for one in range(4):
        for other in range(one):
            assert abs((experts[one] == experts[other]).mean() - 1 / 8) < 0.01
        neighbours = (experts[one][1:] == experts[one][:-1]).mean()
        assert abs(neighbours - 1 / 8) < 0.01


def test_an_id_goes_to_one_expert_with_weight_1_in_every_layer_place_and_batch(params):
    model = SwitchTransformer(CONFIG)
    run = jax.jit(lambda p, source, target: model.apply({"params": p}, source, target, output_router_logits=True))
    output = run(params, SOURCE, TARGET)
    table = expert_of_id(50, 4, 0)
    for routers, ids in ((output.encoder_router, SOURCE), (output.decoder_router, TARGET)):
        assert len(routers) == 2
        for router in routers:
            np.testing.assert_array_equal(router.expert_index[..., 0], table[ids])
            np.testing.assert_array_equal(jax.nn.softmax(router.logits).max(-1), 1.0)
            assert router.kept.all() and router.metrics["router_confidence"] == 1.0


def test_there_is_no_router_to_learn_and_no_loss_of_one(params):
    assert "router" not in params["encoder"]["layers_0"]["mlp"]
    output = SwitchTransformer(CONFIG).apply({"params": params}, SOURCE, TARGET)
    for reduction in ("layers", "huggingface"):
        loss = seq2seq_loss(output, TARGET, CONFIG.replace(router_loss_reduction=reduction, router_z_loss_coef=1.0))
        assert loss.load_balancing_loss == loss.router_z_loss == 0.0
    assert loss.loss == loss.cross_entropy + loss.z_loss


def test_scanned_layers_route_alike(params):
    scanned = CONFIG.replace(scan_layers=True)
    stack = lambda *layers: jnp.stack(layers, 1)  # noqa: E731
    stacked = {"token_embedder": params["token_embedder"]}
    for name in ("encoder", "decoder"):
        rest = {key: value for key, value in params[name].items() if not key.startswith("layers_")}
        layers = jax.tree.map(stack, params[name]["layers_0"], params[name]["layers_1"])
        stacked[name] = {**rest, name: {"subblock_0": layers}}
    want = jax.jit(lambda p: SwitchTransformer(CONFIG).apply({"params": p}, SOURCE, TARGET).logits)(params)
    got = jax.jit(lambda p: SwitchTransformer(scanned).apply({"params": p}, SOURCE, TARGET).logits)(stacked)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_embeddings_without_ids_are_refused_by_name_and_taken_beside_them(params):
    model, embeddings = SwitchTransformer(CONFIG), jnp.ones((3, 9, 16))
    with pytest.raises(ValueError, match="router_type='hash' .* the encoder"):
        model.apply({"params": params}, None, TARGET, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="router_type='hash' .* the decoder"):
        model.apply({"params": params}, SOURCE, None, decoder_inputs_embeds=embeddings)
    output = model.apply({"params": params}, SOURCE, TARGET, inputs_embeds=embeddings)
    np.testing.assert_array_equal(output.encoder_router[0].expert_index[..., 0], expert_of_id(50, 4, 0)[SOURCE])


def test_settings_of_a_learned_router_are_refused():
    for change in (
        dict(num_selected_experts=2),
        dict(router_bias=True),
        dict(batch_prioritized_routing=True),
        dict(router_jitter_noise=0.1),
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} is about a router that learns"):
            CONFIG.replace(**change)


def test_a_model_is_saved_as_it_is_and_not_for_hugging_face(params, tmp_path):
    fs.save_pretrained(tmp_path / "ours", CONFIG, params, format="flax_switch")
    loaded = fs.load_pretrained(tmp_path / "ours")
    assert loaded.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(ConfigError, match="router_type"):
        fs.save_pretrained(tmp_path / "theirs", CONFIG, params, format="huggingface")


def test_an_id_outside_the_vocabulary_is_no_other_error_than_elsewhere():
    logits = hash_logits(jnp.asarray([[0, 99]]), vocab_size=50, num_experts=4, seed=0)
    assert (jnp.exp(logits).sum(-1) == 1).all()
