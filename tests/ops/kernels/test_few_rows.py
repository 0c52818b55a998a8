"""Experts that are read one by one: when they are, and where they lie."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_switch.ops.kernels.few_rows import unstacked_experts


def test_experts_one_by_one_share_the_memory_of_the_stacked_ones():
    stacked = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 64)), jnp.float32)
    params = {"decoder": {"layers_1": {"mlp": {"expert": {"wi": {"kernel": stacked}}}}}}
    experts = unstacked_experts(params, (1,), 4)["decoder"]["layers_1"]["mlp"]["experts"]
    start = stacked.unsafe_buffer_pointer()
    assert [one["wi"].unsafe_buffer_pointer() - start for one in experts] == [e * 64 * 64 * 4 for e in range(4)]


def test_experts_on_several_devices_are_not_read_one_by_one():
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    stacked = jax.device_put(np.zeros((4, 8, 8), np.float32), sharding)
    params = {"decoder": {"layers_1": {"mlp": {"expert": {"wi": {"kernel": stacked}}}}}}
    assert unstacked_experts(params, (1,), 4) is None
