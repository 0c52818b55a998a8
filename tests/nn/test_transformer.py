"""Laws of the model: causality, padding, packing, caches, scanning, remat, precision and initialisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_switch.config import SwitchConfig
from flax_switch.config.presets import PRESETS
from flax_switch.nn.init import init_params, logical_axes
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
from flax_switch.ops.losses import seq2seq_loss

CONFIG = SwitchConfig(
    vocab_size=50, d_model=16, num_heads=2, d_kv=8, d_ff=24, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, capacity_mode="dropless", ignore_padding_tokens=True,
    dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip
# Two scanned blocks of a dense and a sparse layer, and two of a sparse layer alone.
DEEP = CONFIG.replace(num_encoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
SOURCE = jax.random.randint(jax.random.key(1), (3, 7), 2, 50)
TARGET = jax.random.randint(jax.random.key(2), (3, 5), 2, 50)
MASK = jnp.array([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])


def fresh(config):
    return jax.jit(lambda: init_params(SwitchTransformer(config), jax.random.key(0)))()


@pytest.fixture(scope="module")
def params():
    return fresh(CONFIG)


def logits_of(config, params, source=SOURCE, target=TARGET, mask=MASK, **options):
    model = SwitchTransformer(config)
    return jax.jit(lambda p: model.apply({"params": p}, source, target, mask, **options))(params).logits


def test_the_decoder_sees_nothing_to_its_right(params):
    model = SwitchTransformer(CONFIG)

    def logit_sum(embeddings, position):
        output = model.apply({"params": params}, SOURCE, attention_mask=MASK, decoder_inputs_embeds=embeddings)
        return output.logits[:, position].sum()

    embeddings = jax.random.normal(jax.random.key(3), (3, 5, 16))
    for position in (0, 2, 4):
        grads = jnp.abs(jax.jit(jax.grad(logit_sum), static_argnums=1)(embeddings, position)).sum((0, 2))
        assert (grads[: position + 1] > 0).all()
        assert not grads[position + 1 :].any()


def test_padding_changes_no_real_position(params):
    rng = jax.random.key(4)
    other = jnp.where(MASK == 1, SOURCE, jax.random.randint(rng, SOURCE.shape, 2, 50))
    np.testing.assert_allclose(logits_of(CONFIG, params), logits_of(CONFIG, params, source=other), atol=1e-6)


@pytest.mark.parametrize("zeroed", [True, False])
def test_a_row_without_padding_is_the_same_alone(params, zeroed):
    config = CONFIG.replace(zero_padding_activations=zeroed)
    together = logits_of(config, params)
    alone = logits_of(config, params, source=SOURCE[2:, :3], target=TARGET[2:], mask=MASK[2:, :3])
    np.testing.assert_allclose(together[2:], alone, atol=1e-5)


def test_packed_segments_equal_separate_rows(params):
    source = jnp.concatenate([SOURCE[1:2, :5], SOURCE[2:, :3]], 1)
    target = jnp.concatenate([TARGET[1:2, :2], TARGET[2:, :3]], 1)
    packed = logits_of(
        CONFIG, params, source=source, target=target, mask=jnp.ones_like(source),
        segment_ids=jnp.array([[1] * 5 + [2] * 3]), decoder_segment_ids=jnp.array([[1] * 2 + [2] * 3]),
    )  # fmt: skip
    first = logits_of(CONFIG, params, source=SOURCE[1:2, :5], target=TARGET[1:2, :2], mask=None)
    second = logits_of(CONFIG, params, source=SOURCE[2:, :3], target=TARGET[2:, :3], mask=None)
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), atol=1e-5)


@jax.jit
def encode(params):
    return SwitchTransformer(CONFIG).apply({"params": params}, SOURCE, MASK, method="encode").last_hidden_state


@pytest.mark.parametrize("prefill", [1, 3])
def test_cached_decoding_equals_the_whole_pass(params, prefill):
    model, variables = SwitchTransformer(CONFIG), {"params": params}
    encoded = encode(params)
    cache = jax.jit(lambda e: model.apply(variables, e, 6, method="init_cache"))(encoded)
    step = jax.jit(lambda ids, cache: model.apply(variables, ids, None, MASK, cache=cache, method="decode"))
    pieces, start = [], 0
    for end in (prefill, *range(prefill + 1, 6)):
        output = step(TARGET[:, start:end], cache)
        pieces.append(output.logits)
        cache, start = output.cache, end
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), logits_of(CONFIG, params), atol=1e-5)


def test_beams_share_the_keys_of_their_source(params):
    model, variables = SwitchTransformer(CONFIG), {"params": params}
    encoded = encode(params)
    ids = jax.random.randint(jax.random.key(5), (6, 1), 2, 50)
    shared = jax.jit(lambda e: model.apply(variables, e, 4, rows_per_source=2, method="init_cache"))(encoded)
    copied = jax.jit(lambda e: model.apply(variables, e, 4, method="init_cache"))(encoded.repeat(2, 0))
    assert shared.layers[0].source.key.shape[0] == 3
    step = jax.jit(
        lambda cache, mask: model.apply(variables, ids, None, mask, cache=cache, method="decode", output_attentions=True)
    )
    both = [step(shared, MASK), step(copied, MASK.repeat(2, 0))]
    np.testing.assert_allclose(both[0].logits, both[1].logits, atol=1e-5)
    np.testing.assert_allclose(both[0].cross_attentions[1], both[1].cross_attentions[1], atol=1e-6)


def scanned(params, config):
    """Canonical parameters stacked for scanned layers."""
    flat = flatten_dict(params, sep="/")
    stacked = {}
    for stack in ("encoder", "decoder"):
        num_layers, size = getattr(config, stack).num_layers, getattr(config, stack).block_size
        layers = {k: v for k, v in flat.items() if k.startswith(f"{stack}/layers_")}
        for key in layers:
            _, layer, rest = key.split("/", 2)
            i = int(layer.removeprefix("layers_"))
            if i < size:
                parts = [flat[f"{stack}/layers_{j}/{rest}"] for j in range(i, num_layers, size)]
                stacked[f"{stack}/{stack}/subblock_{i}/{rest}"] = jnp.stack(parts, 1)
    return unflatten_dict({**{k: v for k, v in flat.items() if "/layers_" not in k}, **stacked}, sep="/")


def loss_and_grads(config, params):
    def loss(params):
        params = scanned(params, config) if config.scan_layers else params
        output = SwitchTransformer(config).apply(
            {"params": params}, SOURCE, TARGET, MASK, output_hidden_states=True, output_router_logits=True
        )
        return seq2seq_loss(output, TARGET, config).loss, output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def deep_params():
    return fresh(DEEP)


@pytest.fixture(scope="module")
def unrolled(deep_params):
    return loss_and_grads(DEEP, deep_params)


@pytest.mark.parametrize(
    ("scan", "remat"), [(True, "none"), pytest.param(True, "full", marks=pytest.mark.slow), (False, "minimal")]
)
def test_scanning_and_remat_change_neither_values_nor_gradients(deep_params, unrolled, scan, remat):
    (loss, output), grads = loss_and_grads(DEEP.replace(scan_layers=scan, remat_policy=remat), deep_params)
    (expected, expected_output), expected_grads = unrolled
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(expected_output), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scanned_parameters_have_the_layer_axis_second():
    model = SwitchTransformer(DEEP.replace(scan_layers=True))
    expected = jax.eval_shape(lambda: scanned(init_params(SwitchTransformer(DEEP), jax.random.key(0)), DEEP))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, expected)
    axes = logical_axes(model)["encoder"]["encoder"]["subblock_1"]["mlp"]["expert"]["wi"]["kernel"]
    assert axes == ("expert", "layers", "embed", "mlp")


def test_the_extra_mlp_gated_units_untied_head_and_tables_per_layer_have_their_parameters():
    config = CONFIG.replace(
        extra_mlp=True, mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False, relative_attention_per_layer=True,
        shared_expert=True, router_bias=True,
    )  # fmt: skip
    params = fresh(config)
    paths = set(flatten_dict(params, sep="/"))
    assert {
        "encoder/layers_1/extra_mlp/wi_0/kernel", "encoder/layers_1/pre_extra_mlp_layer_norm/scale",
        "encoder/layers_1/mlp/expert/wi_1/kernel", "encoder/layers_0/mlp/wi_0/kernel", "decoder/logits_dense/kernel",
        "decoder/layers_1/relpos_bias/rel_embedding", "encoder/layers_1/mlp/shared_expert/wo/kernel",
        "encoder/layers_1/mlp/router/router_weights/w/bias",
    } <= paths  # fmt: skip
    assert "encoder/relpos_bias/rel_embedding" not in paths
    assert jnp.isfinite(logits_of(config, params)).all()


def test_the_encoder_alone_gives_the_models_encoder_states(params):
    alone = {k: v for k, v in params.items() if k != "decoder"}
    output = SwitchEncoder(CONFIG).apply({"params": alone}, SOURCE, MASK)
    whole = SwitchTransformer(CONFIG).apply({"params": params}, SOURCE, TARGET, MASK)
    np.testing.assert_array_equal(output.last_hidden_state, whole.encoder_last_hidden_state)
    assert jax.tree.structure(init_params(SwitchEncoder(CONFIG), jax.random.key(0))) == jax.tree.structure(alone)


def test_selective_precision_keeps_parameters_routers_and_logits_in_float32(params):
    config = CONFIG.replace(dtype="bfloat16")
    model = SwitchTransformer(config)
    fresh_params = fresh(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh_params)} == {jnp.dtype("float32")}
    apply = jax.jit(lambda p: model.apply({"params": p}, SOURCE, TARGET, MASK, output_router_logits=True))
    output = apply(fresh_params)
    assert output.logits.dtype == output.encoder_router[0].logits.dtype == jnp.float32
    assert output.encoder_last_hidden_state.dtype == jnp.bfloat16
    reference = logits_of(CONFIG, fresh_params)
    assert jnp.abs(output.logits - reference).max() < 0.1 * jnp.abs(reference).max()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("switch-base-8", 619), ("switch-base-16", 1070), ("switch-base-32", 1980), ("switch-base-64", 3790),
        ("switch-base-128", 7400), ("switch-base-256", 14700), ("switch-large-128", 26300), ("switch-xxl-128", 395_000),
        ("switch-c-2048", 1_570_000), ("t5-base", 223),
    ],
)  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, millions):
    config = PRESETS[name].replace(scan_layers=True)
    shapes = jax.eval_shape(lambda: init_params(SwitchTransformer(config), jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 / millions - 1) < 0.007


def test_initialisation_follows_switch_and_t5():
    config = SwitchConfig(
        vocab_size=512, d_model=256, num_heads=4, d_kv=64, d_ff=512, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
    )  # fmt: skip
    flat = flatten_dict(fresh(config), sep="/")
    layer = "encoder/layers_1"
    expected = {
        "token_embedder/embedding": 1.0,
        "encoder/layers_0/mlp/wi/kernel": math.sqrt(0.1 / 256),
        "encoder/layers_0/mlp/wo/kernel": math.sqrt(0.1 / 512),
        f"{layer}/attention/key/kernel": math.sqrt(0.1 / 256),
        f"{layer}/attention/query/kernel": math.sqrt(0.1 / 256 / 64),
        f"{layer}/mlp/expert/wi/kernel": math.sqrt(0.1 / 256),
        f"{layer}/mlp/expert/wo/kernel": math.sqrt(0.1 / 512),
        f"{layer}/mlp/router/router_weights/w/kernel": 0.02,
        "encoder/relpos_bias/rel_embedding": math.sqrt(0.1 / ((4 + 32) / 2)),
    }
    for path, std in expected.items():
        assert abs(float(flat[path].std()) / std - 1) < 0.15, path
    # Truncated at two standard deviations (of the distribution before truncation, 1.137 times as wide).
    assert float(jnp.abs(flat["encoder/layers_0/mlp/wi/kernel"]).max()) <= 2.28 * math.sqrt(0.1 / 256)
    experts = flat[f"{layer}/mlp/expert/wi/kernel"]
    assert not jnp.allclose(experts[0], experts[1])


def test_training_mode_needs_its_random_streams_and_uses_the_training_capacity():
    config = CONFIG.replace(
        dropout_rate=0.1, router_jitter_noise=0.1, capacity_mode="factor", capacity_factor=0.25, min_expert_capacity=1
    )
    params, model = fresh(config), SwitchTransformer(config)

    @jax.jit
    def train(rng):
        rngs = {"dropout": rng, "jitter": rng}
        return model.apply({"params": params}, SOURCE, TARGET, deterministic=False, rngs=rngs)

    runs = [train(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    assert not jnp.allclose(runs[0].logits, runs[2].logits)
    evaluated = jax.jit(lambda p: model.apply({"params": p}, SOURCE, TARGET))(params)
    assert evaluated.encoder_router[0].kept.sum() > runs[0].encoder_router[0].kept.sum()
