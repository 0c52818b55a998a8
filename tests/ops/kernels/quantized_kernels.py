"""Quantised kernels of random integers."""

import jax.numpy as jnp
import numpy as np

from flax_switch.ops.kernels.quantized import Quantized


def draw_int8(rng, *shape):
    *lead, inputs, outputs = shape
    values = rng.integers(-127, 128, (*lead, outputs, inputs)).astype(np.int8)
    return Quantized(jnp.asarray(values), jnp.asarray(rng.uniform(0.001, 0.01, (*lead, outputs, 1)), jnp.float32))


def draw_int4(rng, *shape):
    *lead, inputs, outputs = shape
    values = rng.integers(0, 256, (*lead, outputs, inputs // 64, 32)).astype(np.uint8)
    return Quantized(jnp.asarray(values), jnp.asarray(rng.uniform(-0.1, 0.1, (*lead, outputs, inputs // 64, 1)), jnp.bfloat16))


def whole_rows(rng, *shape):
    """Rows of numbers that 8 bits hold, each times a power of two: rounding them changes nothing."""
    whole = rng.integers(-127, 128, shape)
    whole[..., 0] = 127
    return jnp.asarray(whole * 2.0 ** rng.integers(-3, 4, (*shape[:-1], 1)), jnp.float32)
