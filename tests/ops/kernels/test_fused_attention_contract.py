"""Fused attention's precision in bfloat16, head by head, and where "auto" takes it. The rest is in test_implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import fused

from flax_switch.ops.kernels.fused_attention import fuses
from flax_switch.ops.kernels.platforms import compiled_for


def by_head(x):
    return x if x.ndim == 2 else x.swapaxes(0, 1).reshape(x.shape[1], -1)


@pytest.mark.parametrize("implementation", ["blocks", "mosaic"])
def test_in_bfloat16_every_head_is_near_float32(implementation):
    case = "masks, empty rows, dropout"
    got, want = (fused(name, case, dtype) for name, dtype in ((implementation, jnp.bfloat16), ("reference", jnp.float32)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == (jnp.float32 if b.ndim == 2 else jnp.bfloat16)
        a, b = (by_head(np.asarray(x, np.float32)) for x in (a, b))
        # Inputs, weights and outputs are rounded to 8 bits.
        assert (np.linalg.norm(a - b, axis=1) < 0.02 * np.linalg.norm(b, axis=1)).all()


@pytest.mark.parametrize(("platform", "side"), [("cpu", 1024), ("tpu", 128), ("gpu", 128)])
def test_by_platform_and_lengths_auto_fuses_what_is_long(platform, side):
    with compiled_for(platform):
        assert not fuses("auto", side, side - 1) and fuses("auto", side, side)
        assert fuses("fused", 1, 1) and not fuses("plain", 10**5, 10**5)
    assert fuses("auto", 512, 512) == (jax.default_backend() != "cpu")
