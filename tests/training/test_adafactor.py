"""Adafactor against T5X's, with expert and layer axes as batch axes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_switch.training.adafactor import adafactor

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "t5x_adafactor.npz")


def golden_value(prefix, path, value):
    """The golden array and the part of `value` it holds (every 7th element of large ones)."""
    if f"{prefix}/{path}@7" in GOLDEN:
        return GOLDEN[f"{prefix}/{path}@7"], np.asarray(value).ravel()[::7]
    return GOLDEN[f"{prefix}/{path}"], np.asarray(value)


def test_three_steps_equal_t5x():
    layout = json.loads(str(GOLDEN["cfg"]))
    axes = {path: tuple(entry["axes"]) for path, entry in layout.items()}
    random = np.random.RandomState(5)
    params = {path: (random.standard_normal(e["shape"]) * 0.1).astype(np.float32) for path, e in layout.items()}
    for path, value in params.items():
        golden, ours = golden_value("param0", path, value)
        np.testing.assert_array_equal(ours, golden)
    optimizer = adafactor(axes, lambda step: 0.01)
    state = optimizer.init(params)
    for _ in range(3):
        grads = {
            path: (random.standard_normal(e["shape"]) * 10 ** random.uniform(-3, 1)).astype(np.float32)
            for path, e in layout.items()
        }
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    for path, value in params.items():
        golden, ours = golden_value("param3", path, value)
        np.testing.assert_allclose(ours, golden, rtol=1e-5, atol=1e-6)
    for part, name in (("row", "v_row"), ("col", "v_col"), ("full", "v")):
        for path, value in getattr(state, part).items():
            if value.shape != (1,):
                np.testing.assert_allclose(value, GOLDEN[f"state3/{path}/{name}"], rtol=2e-5)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_stack_of_experts_is_updated_like_separate_parameters(clip):
    key = jax.random.key(0)
    param = jax.random.normal(key, (5, 130, 140)) * jnp.arange(1.0, 6.0)[:, None, None]
    grads = [jax.random.normal(jax.random.fold_in(key, i), param.shape) * 10.0**-i for i in range(3)]
    stacked = {"w": param}
    alone = {str(e): param[e] for e in range(5)}
    optimizers = [
        adafactor({"w": ("expert", "embed", "mlp")}, lambda s: 0.1, clipping_threshold=clip),
        adafactor(dict.fromkeys(alone, ("embed", "mlp")), lambda s: 0.1, clipping_threshold=clip),
    ]
    states = [optimizers[0].init(stacked), optimizers[1].init(alone)]
    for g in grads:
        updates, states[0] = optimizers[0].update({"w": g}, states[0], stacked)
        stacked = optax.apply_updates(stacked, updates)
        updates, states[1] = optimizers[1].update({k: g[int(k)] for k in alone}, states[1], alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_allclose(stacked["w"], jnp.stack([alone[str(e)] for e in range(5)]), rtol=1e-6)
