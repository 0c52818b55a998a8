"""A kernel with an adapter is W + scale * a b, in every place where a kernel is, whatever computes with it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_switch.config import ConfigError, MeshConfig, SwitchConfig
from flax_switch.config.adapter import AdapterConfig, matrix
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.quantize import quantized as quantize_tensors
from flax_switch.convert.tensors import from_array
from flax_switch.nn.adapter import SCAN_AXIS, adapted, adapter_parts, has_adapter, init_adapter, without_adapter
from flax_switch.nn.init import abstract_params, init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels import grouped, quantized
from flax_switch.parallel.mesh import create_mesh, replicated
from flax_switch.parallel.placement import placed_on

BASE = SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=1, num_decoder_layers=2, dropout_rate=0.0,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, router_jitter_noise=0.0,
)  # fmt: skip
MODELS = {
    "sparse": dict(),
    "top-2 of gated experts, with all that a layer may have": dict(
        num_selected_experts=2, mlp_activations=("gelu_new", "linear"), shared_expert=True, extra_mlp=True,
        tie_word_embeddings=False,
    ),
    "scanned": dict(
        scan_layers=True, num_encoder_layers=4, num_decoder_layers=4, encoder_sparse_layers=(1, 3), decoder_sparse_layers=(1, 3),
    ),
    "einsum": dict(moe_executor="einsum"),
    "gather": dict(moe_executor="gather"),
    "ragged": dict(moe_executor="ragged", capacity_mode="dropless"),
    "experts choose": dict(router_type="experts_choose"),
    "dense": dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
    "fused": dict(architecture="decoder_only", layer_form="fused"),
}  # fmt: skip
EVERYTHING = AdapterConfig(rank=3, alpha=6.0, targets=("all", "logits_dense"), router=True)
RNG = np.random.default_rng(0)
IDS, TARGETS = (RNG.integers(2, 64, (4, 6)) for _ in range(2))


def drawn(tree, seed=1):
    """The same tree with parts of some size: a fresh adapter's b is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(leaf) * rng.uniform(0.5, 1.5, leaf.shape) + rng.normal(size=leaf.shape) * 0.1), tree
    )


def plain(params, adapter, scale):
    """The sum by numpy's rules, layer by layer."""
    flat, parts = flatten_dict(params, sep="/"), flatten_dict(adapter, sep="/")
    for path in {name.rpartition("/")[0] for name in parts}:
        a, b, magnitude = (parts.get(f"{path}/{name}") for name in ("a", "b", "magnitude"))
        scanned = "/subblock_" in path

        def total(kernel, a, b, magnitude, path=path):
            whole = kernel.reshape(matrix(path, kernel.shape))
            whole = whole + scale * jnp.matmul(a, b)
            if magnitude is not None:
                norms = jnp.linalg.norm(jax.lax.stop_gradient(whole), axis=-2, keepdims=True)
                whole = whole / norms * magnitude[..., None, :]
            return whole.reshape(kernel.shape)

        if scanned:
            layers = [
                total(*(None if x is None else x[:, i] for x in (flat[path], a, b, magnitude))) for i in range(flat[path].shape[1])
            ]
            flat[path] = jnp.stack(layers, axis=1)
        else:
            flat[path] = total(flat[path], a, b, magnitude)
    return unflatten_dict(flat, sep="/")


def model_of(changes):
    config = BASE.replace(**changes)
    model = SwitchTransformer(config)
    return model, init_params(model, jax.random.key(0))


def logits_of(model, params):
    ids = (IDS,) if model.config.decoder_only else (IDS, TARGETS)
    return model.apply({"params": params}, *ids, deterministic=False).logits


def loss(model, params):
    return (logits_of(model, params) @ jnp.cos(jnp.arange(64.0))).mean()


@pytest.mark.parametrize(
    ("changes", "dora"),
    [*((changes, True) for changes in MODELS.values()), (MODELS["sparse"], False), (MODELS["fused"], False)],
    ids=[*(f"DoRA, {name}" for name in MODELS), "LoRA, sparse", "LoRA, fused"],
)
def test_values_and_gradients_are_those_of_the_plain_sum(changes, dora):
    model, params = model_of(changes)
    config = EVERYTHING.replace(use_dora=dora)
    adapter = drawn(init_adapter(model, config, params, jax.random.key(1)))
    kernels = [path for path in flatten_dict(params, sep="/") if path.endswith("/kernel")]
    assert {path.rpartition("/")[0] for path in flatten_dict(adapter, sep="/")} == set(kernels)
    with_adapter = jax.jit(jax.value_and_grad(lambda tree: loss(model, adapted(params, tree, config.scale()))))
    with_sum = jax.jit(jax.value_and_grad(lambda tree: loss(model, plain(params, tree, config.scale()))))
    (found, gradients), (expected, expected_gradients) = with_adapter(adapter), with_sum(adapter)
    assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    for path, gradient in flatten_dict(gradients, sep="/").items():
        wanted = flatten_dict(expected_gradients, sep="/")[path]
        np.testing.assert_allclose(gradient, wanted, rtol=2e-3, atol=2e-5 * max(1.0, np.abs(wanted).max()), err_msg=path)
        assert np.abs(wanted).max() > 0 or "router" in path, path


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_fresh_adapter_changes_nothing_and_can_be_taken_off(dora):
    model, params = model_of({})
    config = EVERYTHING.replace(use_dora=dora)
    found = adapted(params, init_adapter(model, config, params, jax.random.key(1)), config.scale())
    assert has_adapter(found) and not has_adapter(params)
    run = jax.jit(lambda params: logits_of(model, params))
    np.testing.assert_allclose(run(found), run(params), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, without_adapter(found), params)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_part_has_the_shape_that_is_told_of_it(changes):
    model = SwitchTransformer(BASE.replace(**changes))
    config = EVERYTHING.replace(use_dora=True)
    made = jax.eval_shape(lambda params: init_adapter(model, config, params, jax.random.key(1)), abstract_params(model))
    parts = adapter_parts(model, config)
    assert {path: part.shape for path, part in parts.items()} == {p: x.shape for p, x in flatten_dict(made, sep="/").items()}
    assert all(len(part.shape) == len(part.axes) for part in parts.values())


def test_the_parts_of_scanned_layers_are_those_of_a_layer_with_an_axis_of_layers():
    changes = MODELS["scanned"]
    config = EVERYTHING.replace(use_dora=True)
    scanned, plain = (
        adapter_parts(SwitchTransformer(BASE.replace(**{**changes, "scan_layers": s})), config) for s in (True, False)
    )
    stacked = {path: part for path, part in scanned.items() if "/subblock_" in path}
    assert stacked and len(plain) == len(scanned) - len(stacked) + 2 * len(stacked)  # two periods of four layers
    for path, part in stacked.items():
        one = plain[re.sub(r"^(\w+)/\w+/subblock_(\d+)", r"\1/layers_\2", path)]
        assert part.shape == (*one.shape[:SCAN_AXIS], 2, *one.shape[SCAN_AXIS:])
        assert part.axes == (*one.axes[:SCAN_AXIS], "layers", *one.axes[SCAN_AXIS:])


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("changes", [dict(), dict(capacity_mode="dropless", moe_executor="ragged")], ids=["capacity", "dropless"])
def test_on_a_mesh_it_is_what_it_is_on_one_device(changes, dora):
    model, params = model_of({**changes, "num_selected_experts": 2})
    config = EVERYTHING.replace(use_dora=dora)
    adapter = drawn(init_adapter(model, config, params, jax.random.key(1)))
    mesh = create_mesh(MeshConfig(data=2, expert=2, model=2))
    over = model.clone(devices=placed_on(mesh))
    run = lambda model: jax.jit(lambda p, t: logits_of(model, adapted(p, t, config.scale())))  # noqa: E731
    whole = jax.device_put((params, adapter), replicated(mesh))
    np.testing.assert_allclose(run(over)(*whole), run(model)(params, adapter), atol=2e-5)


def quantized_params(model, params, weights):
    config = model.config.replace(weights=weights, tie_word_embeddings=model.config.tie_word_embeddings)
    flat = {path: from_array(np.asarray(leaf)) for path, leaf in flatten_dict(params, sep="/").items()}
    arrays = {path: jnp.asarray(tensor.numpy()) for path, tensor in quantize_tensors(config, flat).items()}
    return SwitchTransformer(config), unflatten_dict(arrays, sep="/")


@pytest.mark.slow  # below are the products' gradients, in tests/pretrained/test_adapters.py what such a model says
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_have_an_adapter_as_the_floats_have_that_they_stand_for(weights, dora):
    changes = dict(d_model=64, d_ff=64, d_kv=32, tie_word_embeddings=False, num_decoder_layers=1)
    model, params = model_of(changes)
    integers, held = quantized_params(model, params, weights)
    config = EVERYTHING.replace(use_dora=dora, targets="all", router=False)
    adapter = drawn(init_adapter(integers, config, held, jax.random.key(1)))
    shapes = canonical_shapes(model.config)
    floats = {}
    for path, leaf in flatten_dict(held, sep="/").items():
        if path in shapes:
            scale = flatten_dict(held, sep="/").get(path + "_scale")
            floats[path] = leaf if scale is None else quantized.dequantized(quantized.Quantized(leaf, scale))
    floats = unflatten_dict(floats, sep="/")
    gradient = lambda model, params: jax.jit(jax.grad(lambda tree: loss(model, adapted(params, tree, config.scale()))))  # noqa: E731
    found, wanted = (flatten_dict(g(adapter), sep="/") for g in (gradient(integers, held), gradient(model, floats)))
    for path, expected in wanted.items():
        cosine = (found[path] * expected).sum() / (jnp.linalg.norm(found[path]) * jnp.linalg.norm(expected) + 1e-30)
        assert cosine > 0.98, path  # on a CPU rows are rounded to 8 bits


@pytest.mark.parametrize("implementation", ["reference", "rounded_rows", "dequantized"])
def test_a_quantised_product_has_the_gradient_of_the_exact_one(implementation):
    values = jnp.asarray(RNG.integers(-127, 128, (5, 8)), jnp.int8)
    kernel = quantized.Quantized(values, jnp.asarray(RNG.uniform(0.1, 1, (5, 1)), jnp.float32))
    x = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    run = functools.partial(quantized.multiply_quantized, kernel=kernel, implementation=implementation)
    np.testing.assert_allclose(
        jax.grad(lambda x: (run(x) @ jnp.arange(5.0)).sum())(x),
        jax.grad(lambda x: (x @ quantized.dequantized(kernel) @ jnp.arange(5.0)).sum())(x),
        rtol=1e-5,
    )


def test_grouped_rows_of_quantised_kernels_have_the_gradient_of_the_exact_product():
    values = jnp.asarray(RNG.integers(-127, 128, (3, 5, 8)), jnp.int8)
    kernel = quantized.Quantized(values, jnp.asarray(RNG.uniform(0.1, 1, (3, 5, 1)), jnp.float32))
    x, sizes = jnp.asarray(RNG.normal(size=(7, 8)), jnp.float32), jnp.asarray([2, 0, 4])
    run = lambda x, kernel: (grouped.grouped_matmul(x, kernel, sizes) @ jnp.arange(5.0)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(run)(x, kernel), jax.grad(run)(x, quantized.dequantized(kernel)), rtol=1e-4)


def test_dropout_leaves_out_inputs_of_an_adapter_and_keeps_what_is_expected():
    model, params = model_of({})
    config = AdapterConfig(rank=3, targets="encoder/.*query")
    adapter = drawn(init_adapter(model, config, params, jax.random.key(1)))
    path = ("encoder", "layers_0", "attention", "query", "kernel")
    of = lambda rng: flatten_dict(adapted(params, adapter, dropout=0.25, rng=rng))[path].a  # noqa: E731
    whole = flatten_dict(adapter)[(*path, "a")]
    draws = np.asarray(jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(0), 400)))
    rows = (draws == 0).all(-1)
    assert rows.mean() == pytest.approx(0.25, abs=0.03) and ((draws == 0).any(-1) == rows).all()
    np.testing.assert_allclose(draws.mean(0), whole, atol=0.25 * np.abs(whole).max())
    np.testing.assert_array_equal(of(None), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(targets="quary"), "adapter.targets='quary' matches no kernel; a path looks like"),
        (dict(targets="(query"), "adapter.targets: '(query' is no regular expression"),
        (dict(dropout=1.0), "adapter.dropout must lie in [0, 1)"),
        (dict(alpha=0.0), "adapter.alpha must be positive"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        AdapterConfig(rank=4, **settings).kernels(canonical_shapes(BASE))
    assert message in str(error.value)


def test_the_scale_is_alpha_by_the_rank_or_by_its_root():
    assert AdapterConfig(rank=4, alpha=8.0).scale() == 2.0
    assert AdapterConfig(rank=4, alpha=8.0, use_rslora=True).scale() == 4.0
