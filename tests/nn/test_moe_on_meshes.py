"""The sparse MLP laid over meshes: values, routing, losses, metrics and gradients are those of one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import MeshConfig, SwitchConfig
from flax_switch.nn.moe import SparseMLP
from flax_switch.partitioning import batch_sharding, create_mesh, use_mesh

MODEL = SwitchConfig(
    d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=8, min_expert_capacity=1, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip
SHAPE = (16, 16, 16)
X, COTANGENT = (np.random.default_rng(i).normal(size=SHAPE).astype(np.float32) for i in range(2))
MASK = np.arange(16)[None] < np.arange(1, 17)[:, None]


def variables_of(module):
    return nn.unbox(module.init(jax.random.key(0), X[:1], padding_mask=None, deterministic=True))


def values_and_gradients(module, variables, mesh):
    """Everything the layer tells of a batch, and its gradients, on a mesh or on one device."""

    def loss(variables, x):
        y, router = module.apply(variables, x, padding_mask=jnp.asarray(MASK), deterministic=False)
        return (y * COTANGENT).sum() + router.load_balancing_loss + router.z_loss, (y, router)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        return jax.device_get(run(variables, X))
    mesh = create_mesh(mesh)
    with use_mesh(mesh):
        return jax.device_get(run(variables, jax.device_put(X, batch_sharding(mesh))))


@pytest.mark.parametrize(
    "settings",
    [
        dict(capacity_factor=0.75, moe_executor="einsum"),
        dict(routing_group="tokens", group_size=32, num_selected_experts=2, ignore_padding_tokens=True, capacity_factor=0.75),
        dict(capacity_mode="dropless", num_selected_experts=2, expert_parallel_buffer_factor=2.0, shared_expert=True,
             mlp_activations=("gelu_new", "linear"), ignore_padding_tokens=True),
    ],
    ids=["capacity", "tokens", "dropless"],
)  # fmt: skip
def test_on_a_mesh_the_layer_does_what_it_does_on_one_device(settings):
    module = SparseMLP(MODEL.replace(**settings), "encoder")
    variables = variables_of(module)
    want = values_and_gradients(module, variables, None)
    got = values_and_gradients(module, variables, MeshConfig(data=2, expert=2, model=2))
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_a_full_buffer_drops_choices_and_counts_them_exactly():
    config = MODEL.replace(capacity_mode="dropless", num_selected_experts=2, expert_parallel_buffer_factor=0.5)
    module = SparseMLP(config, "encoder")
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    run = jax.jit(lambda variables, x: module.apply(variables, x, padding_mask=None, deterministic=False))
    with use_mesh(mesh):
        y, router = jax.device_get(run(variables_of(module), jax.device_put(X, batch_sharding(mesh))))
    choices = 16 * 16 * 2
    room = choices // 8 // 2  # half a device's even share
    assert router.metrics["choices_overflowed"] == (~router.kept).sum() >= choices / 2
    assert router.metrics["tokens_per_expert"].sum() == router.kept.sum()
    by_device = np.asarray(router.metrics["tokens_per_expert"]).reshape(4, 2).sum(-1)  # both replicas together
    assert (by_device <= 2 * room).all() and (by_device == 2 * room).any()
    nothing = ~router.kept.any(-1)
    assert nothing.any() and (y[nothing] == 0).all() and (np.abs(y[~nothing]).sum(-1) > 0).all()
