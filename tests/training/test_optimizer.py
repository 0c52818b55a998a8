"""Optimisers, schedules and clipping against their formulas written out in NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import OptimizerConfig
from flax_switch.training.optimizer import build_optimizer, global_norm, learning_rate_schedule

STEPS = 50
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(4, 6)), "scale": RNG.normal(size=6), "table": 1e-5 * RNG.normal(size=(2, 6))}
AXES = {"kernel": ("embed", "mlp"), "scale": ("embed",), "table": ("heads", "relpos_buckets")}
GRADS = [{name: (5.0 if t == 1 else 0.2) * RNG.normal(size=value.shape) for name, value in PARAMS.items()} for t in range(4)]


def rate_by_formula(step, schedule, peak, warmup, final):
    """What the docs of OptimizerConfig say of update number `step`, counted from 0, of STEPS."""
    if schedule == "rsqrt":
        return peak / np.sqrt(max(step, warmup, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (STEPS - warmup)
    if schedule == "linear":
        return peak + (final - peak) * done
    if schedule == "cosine":
        return final + (peak - final) * (1 + np.cos(np.pi * done)) / 2
    return peak


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["rsqrt", "constant", "linear", "cosine"])
def test_a_schedule_has_its_formulas_value_at_every_step(schedule, warmup):
    config = OptimizerConfig(schedule=schedule, learning_rate=0.3, warmup_steps=warmup, final_learning_rate=0.02)
    rate = jax.jit(jax.vmap(learning_rate_schedule(config, STEPS)))
    want = [rate_by_formula(step, schedule, 0.3, warmup, 0.02) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rate(jnp.arange(STEPS + 1)), want, rtol=2e-6)
    if schedule in ("linear", "cosine"):
        assert want[-1] == pytest.approx(0.02)


def test_a_schedule_ends_at_zero_where_no_final_rate_is_given():
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig(schedule=schedule, learning_rate=0.3, warmup_steps=5)
        assert float(learning_rate_schedule(config, STEPS)(STEPS)) == pytest.approx(0.0, abs=1e-9)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def adamw(config, params, grads, step, memory):
    for name, g in grads.items():
        m, v = memory.get(name, (0.0, 0.0))
        m, v = config.b1 * m + (1 - config.b1) * g, config.b2 * v + (1 - config.b2) * g**2
        memory[name] = m, v
        update = m / (1 - config.b1 ** (step + 1)) / (np.sqrt(v / (1 - config.b2 ** (step + 1))) + config.eps)
        rate = rate_by_formula(step, config.schedule, config.learning_rate, config.warmup_steps, config.final_learning_rate)
        params[name] = params[name] - rate * (update + config.weight_decay * params[name])


def adafactor(config, params, grads, step, memory):
    """1804.04235, algorithms 4 and 5, without momentum; matrices of at least min_dim_size_to_factor both ways are factored."""
    decay = 1 - (step + 1.0) ** -config.decay_rate
    for name, g in grads.items():
        square = g**2 + 1e-30
        if g.ndim == 2 and min(g.shape) >= config.min_dim_size_to_factor:
            row, col = memory.get(name, (0.0, 0.0))
            row, col = decay * row + (1 - decay) * square.mean(1), decay * col + (1 - decay) * square.mean(0)
            memory[name] = row, col
            second = np.outer(row, col) / row.mean()
        else:
            memory[name] = second = decay * memory.get(name, 0.0) + (1 - decay) * square
        update = g / np.sqrt(second)
        if config.clipping_threshold is not None:
            update = update / max(1.0, rms(update) / config.clipping_threshold)
        rate = rate_by_formula(step, config.schedule, config.learning_rate, config.warmup_steps, config.final_learning_rate)
        if config.multiply_by_parameter_scale:
            rate = rate * max(rms(params[name]), 1e-3)
        params[name] = params[name] - rate * update


SETTINGS = [
    dict(name="adamw", b1=0.8, b2=0.9, eps=0.3, weight_decay=0.05),
    dict(name="adamw", b1=0.8, b2=0.9, eps=0.3, clip_global_norm=2.0),
    dict(name="adamw", b2=0.98),  # at 0.999 the correction 1 - b2 has but five digits in float32
    dict(name="adafactor", min_dim_size_to_factor=3),
    dict(name="adafactor", min_dim_size_to_factor=5, decay_rate=0.6, clipping_threshold=0.7, multiply_by_parameter_scale=False),
    dict(name="adafactor", min_dim_size_to_factor=3, clipping_threshold=None, clip_global_norm=2.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_four_updates_are_those_of_the_formula(settings):
    config = OptimizerConfig(schedule="linear", learning_rate=0.1, warmup_steps=2, final_learning_rate=0.01, **settings)
    optimizer = build_optimizer(config, AXES, STEPS)
    to_jax = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got, want, memory = to_jax(PARAMS), dict(PARAMS), {}
    state, update = optimizer.init(got), jax.jit(optimizer.update)
    clipped = []
    for step, grads in enumerate(GRADS):
        updates, state = update(to_jax(grads), state, got)
        got = jax.tree.map(jnp.add, got, updates)
        if config.clip_global_norm is not None:
            norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
            clipped.append(norm > config.clip_global_norm)
            grads = {name: g * min(1.0, config.clip_global_norm / norm) for name, g in grads.items()}
        (adamw if config.name == "adamw" else adafactor)(config, want, grads, step, memory)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-7, err_msg=name)
    assert not clipped or set(clipped) == {True, False}  # gradients above the limit, and gradients below


def test_the_norm_is_that_of_all_gradients_as_one_vector():
    grads = {"a": jnp.full((3,), 2.0), "b": {"c": jnp.full((2, 2), -1.0)}}
    assert float(global_norm(grads, None)) == pytest.approx(4.0)
