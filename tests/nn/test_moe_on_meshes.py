"""The sparse MLP laid over meshes: values, routing, losses, metrics and gradients are those of one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import MeshConfig, SwitchConfig
from flax_switch.nn.moe import SparseMLP
from flax_switch.ops.kernels import platforms
from flax_switch.ops.moe import expert_parallel
from flax_switch.ops.moe.expert_parallel import FURTHER_ROUNDS
from flax_switch.parallel.mesh import batch_sharding, create_mesh
from flax_switch.parallel.placement import ONE_DEVICE, placed_on
from flax_switch.plan.program import read_program

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

    mesh = mesh and create_mesh(mesh, jax.devices()[: mesh.data * mesh.expert * mesh.model])

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


def all_alike(variables):
    """The same with a router that scores all experts alike, so that every token chooses the first ones."""
    zeroed = lambda path, x: x * 0 if "router" in jax.tree_util.keystr(path) else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(zeroed, variables)


def beyond_the_room(router, factor, data, ways):
    """How many choices their experts' device has no room for at first, by a loop over devices and their rows of the batch."""
    expert = np.where(router.kept, router.expert_index, -1)
    per_device = expert.reshape(ways, data, -1)  # the batch is cut over ("expert", "data")
    room = 8 * int(np.ceil(factor * per_device.shape[-1] / 8))
    held = MODEL.num_experts // ways
    sent = [[(per_device[:, d] // held == receiver).sum() for receiver in range(ways)] for d in range(data)]
    return np.maximum(np.asarray(sent) - room, 0).sum()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("top", "factor", "data", "ways", "model", "adversarial"),
    [
        (2, 0.5, 2, 2, 1, True),
        pytest.param(2, 0.5, 2, 2, 2, True, marks=pytest.mark.slow),
        pytest.param(2, 0.5, 2, 2, 2, False, marks=pytest.mark.slow),
        pytest.param(1, 0.25, 1, 8, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 0.25, 1, 8, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 2.0, 1, 8, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 1.0, 4, 2, 1, True, marks=pytest.mark.slow),
    ],
)
def test_where_a_device_has_no_room_further_rounds_serve_every_choice(top, factor, data, ways, model, adversarial):
    """Values, metrics and gradients are those of one device, though most choices had to wait; and these are counted."""
    module = SparseMLP(
        MODEL.replace(
            capacity_mode="dropless", num_selected_experts=top, ignore_padding_tokens=True, use_bias=True,
            expert_parallel_buffer_factor=factor,
        )
    )  # fmt: skip
    variables = all_alike(variables_of(module)) if adversarial else variables_of(module)
    want = values_and_gradients(module, variables, None)
    got = values_and_gradients(module, variables, MeshConfig(data=data, expert=ways, model=model))
    (_, (_, alone)), (_, (_, router)) = want[0], got[0]
    assert alone.metrics.pop("choices_overflowed") == 0
    assert router.metrics.pop("choices_overflowed") == beyond_the_room(alone, factor, data, ways) > 0
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def gradient_program(config, mesh, platform=None):
    """The layer's values and gradients, lowered for a batch that lies on a mesh."""
    module, mesh = SparseMLP(config), create_mesh(mesh, jax.devices()[: mesh.data * mesh.expert])
    x = jax.ShapeDtypeStruct((*SHAPE[:2], config.d_model), jnp.float32, sharding=batch_sharding(mesh))
    init = lambda key: nn.unbox(module.init(key, jnp.zeros(x.shape), padding_mask=None, deterministic=True))  # noqa: E731
    variables = jax.eval_shape(init, jax.random.key(0))

    def loss(variables, x):
        y, router = module.apply(variables, x, padding_mask=None, deterministic=False, devices=placed_on(mesh))
        return (y**2).sum() + router.load_balancing_loss

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(variables, x)
    return traced.lower(lowering_platforms=None if platform is None else (platform,))


@pytest.mark.slow
def test_a_step_in_which_all_have_room_computes_and_sends_nothing_for_further_rounds(monkeypatch):
    """Counted beside a program without them: all that they add is a number that says how many there are."""
    config = MODEL.replace(capacity_mode="dropless", expert_parallel_buffer_factor=1.5)

    def counted():
        text = gradient_program(config, MeshConfig(data=2, expert=2)).compile().as_text()
        found = read_program(text, 4)
        return found["flops"], {t.kind: t.wire_bytes for t in found["traffic"]}, f"/{FURTHER_ROUNDS}/" in text

    flops, sent, has_rounds = counted()
    monkeypatch.setattr(expert_parallel, "_further_rounds", lambda first, *_: first)
    flops_without, sent_without, has_them_still = counted()
    assert has_rounds and not has_them_still
    assert flops == flops_without and flops > 0
    assert 0 <= sent.pop("all-reduce") - sent_without.pop("all-reduce") <= 2 * 2 * 4  # one int32 forward, one backward
    assert sent == sent_without and sent["all-to-all"] > 0


def test_a_step_that_the_compiler_parts_has_no_kernels_in_it(monkeypatch):
    """XLA cannot cut a kernel for several devices; groups that straddle two of them are such a program's."""
    monkeypatch.setattr(platforms, "POSSIBLE", ("cpu", "tpu"))
    config = MODEL.replace(capacity_mode="dropless", routing_group="tokens", group_size=MASK.size, d_model=128, d_ff=128)
    text = gradient_program(config, MeshConfig(data=2, expert=2), "tpu").as_text()
    assert "tpu_custom_call" not in text and "ragged_dot" not in text
    whole = gradient_program(config.replace(group_size=16), MeshConfig(data=2, expert=2), "tpu").as_text()
    assert "tpu_custom_call" in whole or "ragged_dot" in whole


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
