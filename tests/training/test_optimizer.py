"""Optimisers, schedules and clipping against their formulas written out in NumPy, float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from optax.contrib import MuonDimensionNumbers

from flax_switch.config import OptimizerConfig
from flax_switch.config.presets import PRESETS
from flax_switch.nn.init import logical_axes
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.training.muon import matrix_axes, muon_scale, scale_by_muon
from flax_switch.training.optimizer import build_optimizer, global_norm, learning_rate_schedule, optimizer_state_axes

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


def newton_schulz(x):
    """Muon's five steps; what they make of singular values stays between 0.7 and 1.2."""
    x = x / (np.linalg.norm(x) + 1e-8)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def relative(config, params, grads, step, memory):
    """adamw_rms, and muon: orthogonal momentum (Nesterov's) for "kernel", Nesterov's Adam for the rest; then times the RMS."""
    muon = config.name == "muon"
    for name, g in grads.items():
        m, v = memory.get(name, (0.0, 0.0))
        b1, b2 = (0.95 if muon and name == "kernel" else config.b1), config.b2
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        memory[name] = m, v
        ahead = b1 * m / (1 - b1 ** (step + 2)) + (1 - b1) * g / (1 - b1 ** (step + 1))
        mean = ahead if muon else m / (1 - b1 ** (step + 1))
        if muon and name == "kernel":
            update = 0.2 * np.sqrt(max(g.shape)) * newton_schulz(mean)
        else:
            update = mean / (np.sqrt(v / (1 - b2 ** (step + 1))) + config.eps)
        scale = max(rms(params[name]), 1e-3)
        if muon:  # norms at 0.3 of the rate, relative biases by an absolute one
            scale = {"kernel": scale, "scale": 0.3 * scale, "table": 0.5}[name]
        update = update * scale + config.weight_decay * params[name]
        rate = rate_by_formula(step, config.schedule, config.learning_rate, config.warmup_steps, config.final_learning_rate)
        params[name] = params[name] - rate * update


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


FORMULAS = {"adafactor": adafactor, "adamw": adamw, "adamw_rms": relative, "muon": relative}

SETTINGS = [
    dict(name="adamw_rms", b1=0.8, b2=0.9, eps=0.3, weight_decay=0.05),
    dict(name="adamw_rms", b2=0.98, clip_global_norm=2.0),
    dict(name="muon", b1=0.8, b2=0.9, weight_decay=0.05),
    dict(name="muon", b2=0.98, clip_global_norm=2.0),
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
        FORMULAS[config.name](config, want, grads, step, memory)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-7, err_msg=name)
    assert not clipped or set(clipped) == {True, False}  # gradients above the limit, and gradients below


def test_the_norm_is_that_of_all_gradients_as_one_vector():
    grads = {"a": jnp.full((3,), 2.0), "b": {"c": jnp.full((2, 2), -1.0)}}
    assert float(global_norm(grads, None)) == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["adafactor", "adamw_rms", "muon"])
@pytest.mark.parametrize("stack", ["expert", "layers"])
def test_a_stack_of_matrices_is_updated_like_separate_parameters(name, stack):
    config = OptimizerConfig(name=name, schedule="constant", learning_rate=0.1, warmup_steps=0, min_dim_size_to_factor=3)
    param = jnp.asarray(RNG.normal(size=(5, 8, 12)) * np.arange(1.0, 6.0)[:, None, None], jnp.float32)
    stacked: Any = {"w": param}
    alone: Any = {str(e): param[e] for e in range(5)}
    together = build_optimizer(config, {"w": (stack, "embed", "mlp")}, STEPS)
    apart = build_optimizer(config, dict.fromkeys(alone, ("embed", "mlp")), STEPS)
    states = together.init(stacked), apart.init(alone)
    for size in (1.0, 0.1, 3.0):
        grads = jnp.asarray(size * RNG.normal(size=param.shape), jnp.float32)
        updates, state = together.update({"w": grads}, states[0], stacked)
        each, rest = apart.update({e: grads[int(e)] for e in alone}, states[1], alone)
        stacked, alone, states = optax.apply_updates(stacked, updates), optax.apply_updates(alone, each), (state, rest)
    np.testing.assert_allclose(stacked["w"], jnp.stack(list(alone.values())), rtol=1e-5, atol=1e-6)


def test_an_update_of_muon_is_nearly_orthogonal_and_keeps_the_gradients_directions():
    grad = jnp.asarray(RNG.normal(size=(6, 10)), jnp.float32)
    optimizer = scale_by_muon({"w": ("embed", "mlp")}, 0.9, 0.99, 1e-8)
    updates: Any = optimizer.update({"w": grad}, optimizer.init({"w": grad}), {"w": grad})[0]
    u, values, vt = np.linalg.svd(np.asarray(updates["w"]) / (0.2 * np.sqrt(10)), full_matrices=False)
    assert values.min() > 0.65 and values.max() < 1.25
    assert np.all(np.einsum("is,ij,sj->s", u, np.asarray(grad), vt) > 0)


def test_attention_goes_at_twice_the_rate_of_other_matrices():
    param = jnp.full((2, 3), 0.5)
    assert muon_scale(param, ("embed", "joined_kv")) == pytest.approx(1.0)
    assert muon_scale(param, ("embed", "mlp")) == pytest.approx(0.5)
    assert muon_scale(jnp.zeros(3), ("embed",)) == pytest.approx(3e-4)


def test_embeddings_biases_norms_and_routers_are_no_matrices():
    model = SwitchTransformer(PRESETS["switch-tiny"])
    axes: Any = flatten_dict(logical_axes(model))
    found = {"/".join(path): matrix_axes(names) for path, names in axes.items()}
    assert found["decoder/layers_1/mlp/expert/wi/kernel"] == MuonDimensionNumbers(1, 2)
    assert found["encoder/layers_0/attention/out/kernel"] == MuonDimensionNumbers(0, 1)
    others = [path for path, axes in found.items() if axes is None]
    assert {path.split("/")[-1] for path in others} == {"embedding", "rel_embedding", "scale", "kernel"}
    assert all("router" in path for path in others if path.endswith("kernel"))


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_rms", "muon"])
def test_statistics_are_split_as_the_parameters_they_belong_to(name):
    axes = {"stack": {"kernel": ("expert", "embed", "mlp")}, "scale": ("embed",), "table": ("vocab", "embed")}
    params = {"stack": {"kernel": jnp.ones((2, 4, 6))}, "scale": jnp.ones(4), "table": jnp.ones((5, 4))}
    config = OptimizerConfig(name=name, clip_global_norm=1.0, min_dim_size_to_factor=3)
    state = build_optimizer(config, axes, STEPS).init(params)
    found = optimizer_state_axes(state, params, axes, config)
    of_stack = {"adafactor": {("expert", "embed"), ("expert", "mlp"), (None,)}}.get(name, {("expert", "embed", "mlp")})
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=is_names)
    by_key = {key: {names for path, names in leaves if key in jax.tree_util.keystr(path)} for key in ("stack", "scale", "table")}
    assert by_key["stack"] == of_stack
    assert ("embed",) in by_key["scale"]
    assert name == "adafactor" or by_key["table"] == {("vocab", "embed")}
    assert [path for path, _ in leaves] == [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def is_names(node):
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
