"""Says, before a run on a CPU begins, whether it multiplies slower in the model's dtype than in float32."""

import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_switch.config import SwitchConfig

ROWS = 256  # of a product
SECONDS = 0.05  # that the two kinds of products take in all, after compilation
SLOWER = 1.1  # times float32's time, from which on it is said
LEAST = 3  # of each kind are timed, however long they take


def slow_dtype(model: SwitchConfig) -> str | None:
    """Returns a sentence where products with an MLP's first kernel take longer on this CPU than in float32; else None.

    They are timed by turns; the fastest of each counts, as what else a machine does only adds to it. XLA's CPU backend multiplies
    in bfloat16 by AMX or AVX-512 where jaxlib and the CPU have it, and else by way of float32.
    """
    if jax.default_backend() != "cpu" or jnp.dtype(model.dtype) == jnp.float32:
        return None
    ratio = _ratio(model.d_model, model.d_ff, model.dtype)
    if ratio < SLOWER:
        return None
    return (
        f"model.dtype={model.dtype!r} is slow on this CPU: a product of {ROWS} rows with {model.d_model} x {model.d_ff} weights "
        f"takes {ratio:.1f} times as long as in float32. Set model.dtype='float32' here; a newer jaxlib or CPU may change that."
    )


def _ratio(inputs: int, outputs: int, dtype: DTypeLike) -> float:
    """Returns the time of a product in a dtype over that in float32."""
    multiply, floats = jax.jit(jnp.dot), (jnp.dtype(dtype), jnp.dtype("float32"))
    pairs = [(jnp.ones((ROWS, inputs), kind), jnp.ones((inputs, outputs), kind)) for kind in floats]
    for pair in pairs:
        _seconds(multiply, pair)  # compiles
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < LEAST or time.perf_counter() < end:
        times.append([_seconds(multiply, pair) for pair in pairs])
    narrow, full = map(min, zip(*times, strict=True))
    return narrow / full


def _seconds(multiply, pair: tuple[jax.Array, jax.Array]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(multiply(*pair))
    return time.perf_counter() - started
