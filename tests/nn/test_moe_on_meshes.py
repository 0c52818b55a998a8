"""The sparse MLP laid over meshes: values, routing, losses, metrics and gradients are those of one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import MeshConfig, SwitchConfig
from flax_switch.nn.moe import SparseMLP
from flax_switch.parallel.mesh import batch_sharding, create_mesh
from flax_switch.parallel.placement import ONE_DEVICE, placed_on

MODEL = SwitchConfig(
    d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, vocab_size=100, num_experts=8, min_expert_capacity=1, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip
SHAPE = (16, 16, 16)
X, COTANGENT = (jnp.asarray(np.random.default_rng(i).normal(size=SHAPE), jnp.float32) for i in range(2))
IDS = jnp.asarray(np.random.default_rng(2).integers(0, 100, SHAPE[:2]))
MASK = jnp.arange(16)[None] < jnp.arange(1, 17)[:, None]


def variables_of(module):
    """Fresh variables, biases drawn like kernels."""
    drawn = nn.unbox(module.init(jax.random.key(0), X[:1], padding_mask=None, token_ids=IDS[:1], deterministic=True))
    of_bias = lambda path, x: jax.random.normal(jax.random.key(x.size), x.shape) if "bias" in jax.tree_util.keystr(path) else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_bias, drawn)


def values_and_gradients(module, variables, mesh):
    """Everything the layer tells of a batch, and its gradients, on a mesh or on one device."""

    mesh = mesh and create_mesh(mesh)

    def loss(variables, x):
        y, router = module.apply(
            variables, x, padding_mask=jnp.asarray(MASK), token_ids=IDS, deterministic=False,
            devices=placed_on(mesh) if mesh else ONE_DEVICE,
        )  # fmt: skip
        return (y * COTANGENT).sum() + router.load_balancing_loss + router.z_loss, (y, router)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        return jax.device_get(run(variables, X))
    return jax.device_get(run(variables, jax.device_put(X, batch_sharding(mesh))))


@pytest.mark.parametrize(
    "settings",
    [
        dict(capacity_factor=0.75, moe_executor="einsum"),
        dict(routing_group="tokens", group_size=32, num_selected_experts=2, ignore_padding_tokens=True, capacity_factor=0.75),
        dict(capacity_mode="dropless", num_selected_experts=2, expert_parallel_buffer_factor=2.0, shared_expert=True,
             mlp_activations=("gelu_new", "linear"), ignore_padding_tokens=True),
        dict(router_type="hash", capacity_factor=0.75),
        dict(capacity_mode="dropless", num_selected_experts=2, use_bias=True, normalize_router_weights=True,
             expert_parallel_buffer_factor=4.0),
        pytest.param(dict(capacity_factor=0.75, use_bias=True, moe_executor="gather"), marks=pytest.mark.slow),
    ],
    ids=["capacity", "tokens", "dropless", "hash", "biases", "biases in buffers"],
)  # fmt: skip
def test_on_a_mesh_the_layer_does_what_it_does_on_one_device(settings):
    module = SparseMLP(MODEL.replace(**settings))
    variables = variables_of(module)
    want = values_and_gradients(module, variables, None)
    got = values_and_gradients(module, variables, MeshConfig(data=2, expert=2, model=2))
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_a_full_buffer_drops_choices_and_counts_them_exactly():
    config = MODEL.replace(capacity_mode="dropless", num_selected_experts=2, expert_parallel_buffer_factor=0.5)
    module = SparseMLP(config)
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    run = jax.jit(lambda variables, x: module.apply(variables, x, padding_mask=None, deterministic=False, devices=placed_on(mesh)))
    y, router = jax.device_get(run(variables_of(module), jax.device_put(X, batch_sharding(mesh))))
    choices = 16 * 16 * 2
    room = choices // 8 // 2  # half a device's even share
    assert router.metrics["choices_overflowed"] == (~router.kept).sum() >= choices / 2
    assert router.metrics["tokens_per_expert"].sum() == router.kept.sum()
    by_device = np.asarray(router.metrics["tokens_per_expert"]).reshape(4, 2).sum(-1)  # both replicas together
    assert (by_device <= 2 * room).all() and (by_device == 2 * room).any()
    nothing = ~router.kept.any(-1)
    assert nothing.any() and (y[nothing] == 0).all() and (np.abs(y[~nothing]).sum(-1) > 0).all()


def test_choices_that_overflow_are_counted_without_ignored_padding():
    """All tokens choose expert 0 of 4; its device has room for as many rows as an even share is."""
    config = MODEL.replace(capacity_mode="dropless", num_experts=4, expert_parallel_buffer_factor=1.0)
    x, overflowed = jnp.ones(SHAPE), {}
    mesh = create_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4])
    for ignoring in (False, True):
        module = SparseMLP(config.replace(ignore_padding_tokens=ignoring))
        variables = jax.tree.map(jnp.zeros_like, variables_of(module))
        options = dict(padding_mask=jnp.asarray(MASK), deterministic=False, devices=placed_on(mesh))
        run = jax.jit(lambda v, x, module=module, options=options: module.apply(v, x, **options)[1])
        router = jax.device_get(run(variables, jax.device_put(x, batch_sharding(mesh))))
        wanted, room = int(MASK.sum()) if ignoring else MASK.size, MASK.size // 4
        assert router.metrics["choices_overflowed"] == wanted - room
        assert router.metrics["tokens_per_expert"].tolist() == [room, 0, 0, 0]
        assert router.metrics["fraction_tokens_left_behind"] == pytest.approx((wanted - room) / wanted)
        overflowed[ignoring] = wanted - room
    assert 0 < overflowed[True] < overflowed[False]


def test_every_device_draws_its_own_dropout_and_jitter():
    """Rows that are one row, all sent to one expert with weight 1: without randomness they come out alike, with it no two do."""
    module = SparseMLP(
        MODEL.replace(
            expert_dropout_rate=0.5, router_jitter_noise=0.2, capacity_mode="dropless", mlp_activations=("linear",),
            normalize_router_weights=True,
        )
    )  # fmt: skip
    variables, x = variables_of(module), jnp.broadcast_to(X[:1, :1], SHAPE)
    router = variables["params"]["router"]["router_weights"]["w"]
    router["kernel"] = jnp.zeros_like(router["kernel"]).at[:, 0].set(jnp.sign(X[0, 0]))
    mesh = create_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])

    def layer(variables, x):
        rngs = {"dropout": jax.random.key(0), "jitter": jax.random.key(5)}
        options = dict(padding_mask=None, deterministic=False, rngs=rngs, with_logits=True, devices=placed_on(mesh))
        y, router = module.apply(variables, x, **options)
        return y, router.logits, router.expert_index

    y, logits, expert = jax.device_get(jax.jit(layer)(variables, jax.device_put(x, batch_sharding(mesh))))
    assert not expert.any() and (y != 0).any(-1).all()
    assert len(np.unique(logits[..., 0])) > 0.95 * MASK.size
    assert len({tuple(row) for row in y.reshape(-1, SHAPE[-1]).round(6).tolist()}) > 0.95 * MASK.size


def test_the_parts_of_an_expert_on_several_devices_draw_their_own_dropout():
    """Of an expert cut in two, whose hidden units all are 1, an odd number of units is kept as often as an even one."""
    module = SparseMLP(MODEL.replace(expert_dropout_rate=0.5, capacity_mode="dropless", num_experts=2))
    variables = jax.tree.map(lambda kernel: jnp.full(kernel.shape, 1 / 16), variables_of(module))
    mesh = create_mesh(MeshConfig(data=1, expert=1, model=2), jax.devices()[:2])
    options = dict(padding_mask=None, deterministic=False, devices=placed_on(mesh))
    run = jax.jit(lambda v, x, rng: module.apply(v, x, rngs={"dropout": rng}, **options)[0])
    y = jax.device_get(run(variables, jax.device_put(jnp.ones(SHAPE), batch_sharding(mesh)), jax.random.key(0)))
    kept = y[..., 0] * 2 * 16 / 2  # a router's weight of 1/2, 1/16 of each unit, a scale of 2
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    assert abs((kept.round() % 2).mean() - 0.5) < 4.5 * 0.5 / 16
