"""The sparse MLP as a module: flaxformer's layers, Hugging Face's layer, its parameters, and what must not change its output."""

import functools
import json
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_switch.config import SwitchConfig
from flax_switch.nn.moe import SparseMLP

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = SwitchConfig(d_model=8, d_ff=12, num_experts=4, dropout_rate=0.0)


def variables_of(module, seed=0):
    """Random values for every parameter; drawn by NumPy, since JAX's generators take seconds to compile."""
    x, rng = jnp.zeros((1, 4, module.config.d_model)), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), x, padding_mask=None, deterministic=True)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def small(**settings):
    module = SparseMLP(SMALL.replace(**settings))
    return module, variables_of(module)


def apply(module, variables, x, *, deterministic=True, **options):
    run = jax.jit(functools.partial(module.apply, padding_mask=None, deterministic=deterministic, **options))
    return run(variables, x)


def random_input(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["masked_top1_relu", "masked_top2_gated_gelu", "experts_choose_relu"])
def test_flaxformers_layers_are_reproduced_with_their_gradients(name, mode):
    golden = np.load(GOLDENS / f"moe_layer_{name}.npz")
    cfg = json.loads(str(golden["cfg"]))
    config = SMALL.replace(
        d_model=cfg["d"],
        d_ff=cfg["f"],
        num_experts=cfg["e"],
        num_selected_experts=cfg["k"],
        mlp_activations=tuple("gelu_new" if a == "gelu" else a for a in cfg["act"]),
        router_type="experts_choose" if cfg["router"] == "experts_choose" else "tokens_choose",
        routing_group="tokens",
        group_size=16,  # what flaxformer makes of 64 tokens, groups of at most 32 and 4 experts on one device
        capacity_factor=cfg["cap"][0],
        eval_capacity_factor=cfg["cap"][1],
        min_expert_capacity=cfg["min_cap"],
    )
    params = unflatten_dict({tuple(k.split("/")[1:]): jnp.asarray(golden[k]) for k in golden.files if k.startswith("param/")})

    def loss(params, x):
        y, router = SparseMLP(config).apply({"params": params}, x, padding_mask=None, deterministic=mode == "eval")
        total = jnp.vdot(y, golden["cotangent"]) + 0.01 * router.load_balancing_loss + 0.001 * router.z_loss
        return total, (y, router)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (y, router)), (gradients, input_gradient) = run(params, jnp.asarray(golden["inputs"]))
    np.testing.assert_allclose(y, golden[f"{mode}/outputs"], atol=1e-5)
    np.testing.assert_allclose(total, golden[f"{mode}/loss"], rtol=1e-5)
    np.testing.assert_allclose(input_gradient, golden[f"{mode}/grad_inputs"], rtol=1e-4, atol=1e-5)
    for path, gradient in flatten_dict(gradients, sep="/").items():
        np.testing.assert_allclose(gradient, golden[f"{mode}/grad/{path}"], rtol=1e-4, atol=1e-5)
    metrics = {**router.metrics, "auxiliary_loss": router.load_balancing_loss, "router_z_loss": router.z_loss}
    for key in (k for k in golden.files if k.startswith(f"{mode}/metric/")):
        np.testing.assert_allclose(metrics[key.rsplit("/", 1)[1]], golden[key], atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_faces_layer_is_reproduced_with_its_capacity_by_sequence_and_its_losses(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    torch.manual_seed(0)
    their_config = SwitchTransformersConfig(d_model=8, d_ff=12, num_experts=4, expert_capacity=3, dropout_rate=0.0)
    layer = theirs.SwitchTransformersSparseMLP(their_config).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer = layer.to(getattr(torch, dtype))
    layer.router.classifier.to(torch.float32)
    config = SMALL.replace(
        capacity_mode="fixed", expert_capacity=3, cast_router_probs=True, dtype=dtype, param_dtype=dtype, moe_executor="gather"
    )
    to_jax = lambda tensor: jnp.asarray(tensor.detach().float().numpy())  # noqa: E731
    expert = {
        name: {"kernel": jnp.stack([to_jax(getattr(layer.experts[f"expert_{e}"], name).weight).T for e in range(4)]).astype(dtype)}
        for name in ("wi", "wo")
    }
    router = {"router_weights": {"w": {"kernel": to_jax(layer.router.classifier.weight).T}}}
    x = torch.randn(3, 10, 8).to(getattr(torch, dtype))
    want, logits = layer(x), layer.router(x)[2]
    params = {"expert": expert, "router": router}
    y, output = apply(SparseMLP(config), {"params": params}, to_jax(x).astype(dtype), with_logits=True)
    assert not output.kept.all()
    np.testing.assert_allclose(output.logits, to_jax(logits), atol=1e-5)
    scale = np.abs(to_jax(want)).max()
    np.testing.assert_allclose(np.float32(y) / scale, to_jax(want) / scale, atol=1e-6 if dtype == "float32" else 1e-2)
    balance = theirs.load_balancing_loss_func(torch.softmax(logits, -1), logits.argmax(-1))
    np.testing.assert_allclose(output.load_balancing_loss, balance.item(), rtol=1e-5)
    np.testing.assert_allclose(output.z_loss, theirs.router_z_loss_func(logits).item(), rtol=1e-5)
    # What the loss over several layers needs: means by sequence, which average over layers of one length.
    np.testing.assert_allclose(16 * (output.expert_fraction * output.mean_probs).mean(), balance.item(), rtol=1e-5)


def test_parameters_have_the_canonical_names_shapes_and_axes():
    config = SMALL.replace(mlp_activations=("gelu_new", "linear"), router_bias=True, shared_expert=True, expert_d_ff=10)
    module = SparseMLP(config)
    x = jnp.zeros((1, 2, 8))
    boxed = jax.eval_shape(lambda key: module.init(key, x, padding_mask=None, deterministic=True), jax.random.key(0))["params"]
    wi, wo = ((4, 8, 10), ("expert", "embed", "mlp")), ((4, 10, 8), ("expert", "mlp", "embed"))
    assert {path: (box.value.shape, box.names) for path, box in flatten_dict(boxed, sep="/").items()} == {
        "expert/wi_0/kernel": wi,
        "expert/wi_1/kernel": wi,
        "expert/wo/kernel": wo,
        "shared_expert/wi_0/kernel": (wi[0][1:], wi[1][1:]),
        "shared_expert/wi_1/kernel": (wi[0][1:], wi[1][1:]),
        "shared_expert/wo/kernel": (wo[0][1:], wo[1][1:]),
        "router/router_weights/w/kernel": ((8, 4), ("embed", "unmodeled")),
        "router/router_weights/w/bias": ((4,), ("unmodeled",)),
    }


def test_experts_are_drawn_one_by_one_with_their_own_fan_in():
    config, x = SMALL.replace(d_model=64, d_ff=96), jnp.zeros((1, 4, 64))
    modules = [SparseMLP(config.replace(num_experts=n)) for n in (6, 2)]
    init = lambda module: module.init(jax.random.key(0), x, padding_mask=None, deterministic=True)  # noqa: E731
    kernels = [nn.unbox(jax.jit(functools.partial(init, module))())["params"]["expert"] for module in modules]
    np.testing.assert_array_equal(kernels[0]["wi"]["kernel"][:2], kernels[1]["wi"]["kernel"])
    assert not np.allclose(kernels[0]["wi"]["kernel"][0], kernels[0]["wi"]["kernel"][1])
    np.testing.assert_allclose(kernels[0]["wi"]["kernel"].std((1, 2)), (0.1 / 64) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(kernels[0]["wo"]["kernel"].std((1, 2)), (0.1 / 96) ** 0.5, rtol=0.05)


def test_a_shared_expert_adds_a_dense_mlp():
    module, variables = small(shared_expert=True)
    x = random_input(2, 5, 8)
    y, _ = apply(module, variables, x)
    shared = variables["params"].pop("shared_expert")
    routed, _ = apply(SparseMLP(SMALL), variables, x)
    np.testing.assert_allclose(y - routed, jax.nn.relu(x @ shared["wi"]["kernel"]) @ shared["wo"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("settings", [dict(capacity_factor=1.0), dict(capacity_mode="dropless", routing_group="tokens")])
def test_a_sequences_output_and_routing_do_not_depend_on_its_batch_mates(settings):
    module, variables = small(min_expert_capacity=1, eval_capacity_factor=1.0, **settings)
    run = jax.jit(functools.partial(module.apply, variables, padding_mask=None, deterministic=True))
    x = random_input(3, 10, 8)
    y, output = run(x)
    for other in (x.at[1:].set(random_input(2, 10, 8, seed=1)), x[:1]):
        y2, output2 = run(other)
        np.testing.assert_allclose(y2[0], y[0], atol=1e-6)
        np.testing.assert_array_equal(output2.expert_index[0], output.expert_index[0])
        np.testing.assert_array_equal(output2.kept[0], output.kept[0])


def test_ignored_padding_changes_no_real_token():
    module, variables = small(min_expert_capacity=1, eval_capacity_factor=1.0, ignore_padding_tokens=True)
    run = jax.jit(functools.partial(module.apply, variables, deterministic=True))
    x, mask = random_input(2, 10, 8), jnp.arange(10)[None] < jnp.asarray([[6], [10]])
    y, output = run(x, padding_mask=mask)
    other = jnp.where(mask[..., None], x, random_input(2, 10, 8, seed=1))
    y2, output2 = run(other, padding_mask=mask)
    np.testing.assert_array_equal(jnp.where(mask[..., None], y, 0), jnp.where(mask[..., None], y2, 0))
    assert output.load_balancing_loss == output2.load_balancing_loss
    assert output.z_loss == output2.z_loss
    np.testing.assert_array_equal(y[0, 6:], 0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(capacity_factor=1.0),
        dict(routing_group="tokens", group_size=24, num_selected_experts=2),  # groups that cross the devices' borders
        dict(capacity_mode="dropless", routing_group="tokens", group_size=1000),
    ],
    ids=str,
)
def test_any_sharding_of_the_batch_gives_the_same_plan_losses_metrics_and_gradients(settings):
    module, variables = small(min_expert_capacity=1, **settings)
    x = random_input(8, 9, 8)

    @jax.jit
    def run(variables, x):
        def loss(variables):
            y, router = module.apply(variables, x, padding_mask=None, deterministic=False)
            return (y**2).sum() + router.load_balancing_loss + router.z_loss, (y, router)

        return jax.value_and_grad(loss, has_aux=True)(variables)

    ((_, (y, router)), gradients) = run(variables, x)
    for devices in (2, 8):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        replicated = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        ((_, (y2, router2)), gradients2) = jax.device_get(jax.block_until_ready(run(replicated, sharded)))
        np.testing.assert_array_equal(router2.expert_index, router.expert_index)
        np.testing.assert_array_equal(router2.kept, router.kept)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, (y2, router2, gradients2), (y, router, gradients))


def test_jitter_and_dropout_draw_from_their_own_streams_and_only_in_training():
    module, variables = small(router_jitter_noise=0.3, expert_dropout_rate=0.5)
    x = random_input(2, 6, 8)
    run = jax.jit(lambda jitter, dropout: module.apply(
        variables, x, padding_mask=None, deterministic=False, with_logits=True,
        rngs={"jitter": jax.random.key(jitter), "dropout": jax.random.key(dropout)},
    ))  # fmt: skip
    (y, output), (_, output_jitter), (y_dropout, output_dropout) = run(0, 0), run(1, 0), run(0, 1)
    assert not np.allclose(output.logits, output_jitter.logits)
    np.testing.assert_array_equal(output.logits, output_dropout.logits)
    assert not np.allclose(y, y_dropout)
    plain, plain_output = apply(module, variables, x, with_logits=True)
    again, _ = apply(SparseMLP(SMALL), variables, x)
    np.testing.assert_array_equal(plain, again)
    assert not np.allclose(plain_output.logits, output.logits)


def test_training_and_evaluation_have_their_own_capacity():
    module, variables = small(capacity_factor=0.5, eval_capacity_factor=4.0, min_expert_capacity=1)
    x = random_input(2, 16, 8)
    kept = [apply(module, variables, x, deterministic=d)[1].kept.sum() for d in (False, True)]
    assert kept[0] <= 16 < kept[1] == 32


@pytest.mark.parametrize(("num_experts", "backward"), [(8, True), (64, False)])
def test_gather_costs_its_capacity_in_flops_and_little_more(num_experts, backward):
    factor, T, D, F = 1.25, 4096, 768, 3072
    config = SwitchConfig(
        d_model=D, d_ff=F, num_experts=num_experts, dropout_rate=0.0, routing_group="tokens", group_size=T,
        capacity_factor=factor, moe_executor="gather",
    )  # fmt: skip
    module = SparseMLP(config)
    x = jax.ShapeDtypeStruct((8, T // 8, D), jnp.float32)
    variables = jax.eval_shape(lambda x: nn.unbox(module.init(jax.random.key(0), x, padding_mask=None, deterministic=True)), x)

    def flops(function, *args):
        if backward:
            function = jax.value_and_grad(lambda *args, f=function: (f(*args) ** 2).sum(), argnums=tuple(range(len(args))))
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    moe = flops(lambda v, x: module.apply(v, x, padding_mask=None, deterministic=False)[0], variables, x)
    kernel = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    dense = flops(lambda wi, wo, x: jax.nn.relu(x @ wi) @ wo, kernel(D, F), kernel(F, D), x)
    router = flops(lambda w, x: jax.nn.softmax(x @ w), kernel(D, num_experts), x)
    assert factor * dense < moe <= 1.03 * factor * dense + router
