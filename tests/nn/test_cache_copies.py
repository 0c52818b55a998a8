"""What a step of decoding does to the cache: it writes a column, and moves no other."""

import re

import jax
import jax.numpy as jnp
import pytest

from flax_switch.nn.cache import KeyValue, KeyValueCache
from flax_switch.ops.kernels.attention import cached_attention

HEADS, WIDTH, COLUMNS = 4, 8, 24


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older jaxlib copies the cache of a single row whatever it is told")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs' programs")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_loop_over_tokens_copies_no_cache(rows):
    def step(index, carry):
        cache, x = carry
        cache = cache.append(KeyValue(x + 1, x - 1), index)
        found, _ = cached_attention(x, cache.key, cache.value, mask=jnp.arange(COLUMNS)[None, None, None] <= index)
        return cache, jnp.tanh(found)

    def loop(cache, x, steps):
        return jax.lax.fori_loop(0, steps, step, (cache, x))

    cache = KeyValueCache.empty(rows, HEADS, WIDTH, COLUMNS, jnp.float32)
    program = jax.jit(loop).lower(cache, jnp.ones((rows, 1, HEADS, WIDTH)), jnp.int32(5)).compile()
    bodies = program.as_text().split("ENTRY")[0]
    assert f"f32[{rows},{HEADS},{WIDTH},{COLUMNS}]" in bodies
    assert not re.findall(rf"= f32\[{rows},{HEADS},{WIDTH},{COLUMNS}\]\S* copy\(", bodies)
