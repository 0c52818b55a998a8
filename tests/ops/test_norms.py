"""Norms beside a retelling in numpy, and what they keep for the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.ops.norms import layer_norm, rms_norm

random = np.random.default_rng(0)
X, WEIGHTS = random.normal(size=(2, 3, 5, 16)).astype(np.float32)
SCALE, BIAS = random.normal(size=(2, 16)).astype(np.float32)
EPSILON = 1e-2
NORMS = {"rms": (rms_norm, (SCALE,)), "layer": (layer_norm, (SCALE, BIAS))}


def retold(x, scale, bias=0.0):
    x = x - x.mean(-1, keepdims=True) if np.ndim(bias) else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


def gradients(arguments):
    """By central differences in float64."""
    found, step = [], 1e-5
    for i, argument in enumerate(arguments):
        gradient = np.zeros_like(argument)
        for place in np.ndindex(argument.shape):
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in arguments]
                moved[i][place] += sign * step
                sides.append((retold(*moved) * WEIGHTS).sum())
            gradient[place] = (sides[0] - sides[1]) / (2 * step)
        found.append(gradient)
    return found


@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients_are_those_of_a_retelling(name):
    norm, weights = NORMS[name]
    norm = functools.partial(norm, epsilon=EPSILON, dtype="float32")
    arguments = [a.astype(np.float64) for a in (X, *weights)]
    value, pull = jax.vjp(norm, *map(jnp.asarray, (X, *weights)))
    np.testing.assert_allclose(value, retold(*arguments), rtol=1e-5, atol=1e-5)
    for found, wanted in zip(pull(jnp.asarray(WEIGHTS)), gradients(arguments), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_states_in_bfloat16_are_all_that_is_kept_of_them(name):
    norm, weights = NORMS[name]
    norm = functools.partial(norm, epsilon=EPSILON, dtype="bfloat16")
    kept = jax.vjp(norm, jnp.asarray(X, jnp.bfloat16), *map(jnp.asarray, weights))[1]
    sizes = [(x.dtype.name, x.size) for x in jax.tree.leaves(kept)]
    assert sorted(sizes) == sorted([("bfloat16", X.size), *(("float32", 16) for _ in weights)])
