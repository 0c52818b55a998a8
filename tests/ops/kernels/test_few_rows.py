"""Experts for a few rows: all ways say what a loop over rows and their experts says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.ops.kernels.few_rows import BLOCK, by_gather, by_switch, unstacked_experts
from flax_switch.ops.mlp import mlp

D, F = 6, 10
ROWS = {  # which experts each row hits
    "one row, one choice": [[2]],
    "one row, two choices": [[3, 0]],
    "every row another expert": [[0], [1], [2], [3]],
    "all rows one expert, in several blocks": [[1]] * (2 * BLOCK + 3),
    "a block and one more": [[2]] * (BLOCK + 1) + [[0]],
    "top-2 of many": [[i % 4, (i + 1 + i // 4) % 4] for i in range(23)],
}


def reference(x, expert, kernels):
    """A plain loop in numpy: relu(x wi_0) * (x wi_1), then wo."""
    k = {name: np.asarray(kernel, np.float64) for name, kernel in kernels.items()}
    one = lambda row, e: (np.maximum(row @ k["wi_0"][e], 0) * (row @ k["wi_1"][e])) @ k["wo"][e]  # noqa: E731
    return np.stack([[one(row, e) for e in chosen] for row, chosen in zip(np.asarray(x, np.float64), expert, strict=True)])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", ["gather", "switch"])
def test_each_way_says_what_a_loop_says(way, rows):
    rng = np.random.default_rng(0)
    expert = np.asarray(ROWS[rows], np.int32)
    kernels = {name: rng.normal(size=(4, D, F)).astype(np.float32) for name in ("wi_0", "wi_1")}
    kernels["wo"] = rng.normal(size=(4, F, D)).astype(np.float32)
    x = rng.normal(size=(len(expert), D)).astype(np.float32)
    experts = functools.partial(mlp, activations=("relu", "linear"))
    if way == "gather":
        run = functools.partial(by_gather, stacked=jax.tree.map(jnp.asarray, kernels), mlp=experts)
    else:
        one_by_one = tuple({name: jnp.asarray(kernel[e]) for name, kernel in kernels.items()} for e in range(4))
        run = functools.partial(by_switch, experts=one_by_one, mlp=experts)
    np.testing.assert_allclose(jax.jit(run)(x, expert), reference(x, expert, kernels), rtol=1e-5, atol=1e-5)


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
