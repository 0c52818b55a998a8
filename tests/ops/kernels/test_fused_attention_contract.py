"""Fused attention's precision in bfloat16, head by head, and where "auto" takes it. The rest is in test_implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import fused

from flax_switch.ops.kernels import fused_attention, fused_attention_cudnn, platforms
from flax_switch.ops.kernels.fused_attention import fuses
from flax_switch.ops.kernels.platforms import compiled_for
from flax_switch.ops.kernels.visible import Visible


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


def products(jaxpr):
    """Every product of matrices in a program, in its loops and kernels, too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("implementation", ["blocks", "mosaic"])
def test_in_bfloat16_all_products_are_added_up_in_float32(implementation):
    program = jax.make_jaxpr(lambda: fused(implementation, "masks, empty rows, dropout", jnp.bfloat16))()
    found = list(products(program.jaxpr))
    assert len(found) >= 6  # logits and outputs; again in the way back, and gradients of query, key and value
    assert {equation.outvars[0].aval.dtype for equation in found} == {jnp.dtype(jnp.float32)}


def test_cudnn_is_for_what_it_takes_alone_and_for_gpus(monkeypatch):
    x, visible = jnp.ones((1, 2, 16, 64), jnp.bfloat16), Visible()
    asked = []
    monkeypatch.setattr(platforms, "POSSIBLE", ("cpu", "cuda"))
    monkeypatch.setattr(fused_attention, "can_compile_for", lambda platform: platform == "cuda")
    monkeypatch.setattr(fused_attention_cudnn, "takes", lambda query, visible: False)
    monkeypatch.setattr(fused_attention_cudnn, "attend", lambda query, *_: asked.append("cudnn") or query)
    run = jax.jit(lambda x: fused_attention.fused_attention(x, x, x, None, visible, None))
    expected = fused_attention.fused_attention(x, x, x, None, visible, None, implementation="reference")
    assert (run(x) == expected).all() and not asked
    monkeypatch.setattr(fused_attention_cudnn, "takes", lambda query, visible: True)
    jax.clear_caches()
    run = jax.jit(lambda x: fused_attention.fused_attention(x, x, x, None, visible, None))
    assert (run(x) == expected).all() and asked  # it was traced for a GPU, and this is none


@pytest.mark.parametrize(("platform", "side"), [("cpu", 1024), ("tpu", 128), ("gpu", 128)])
def test_by_platform_and_lengths_auto_fuses_what_is_long(platform, side):
    with compiled_for(platform):
        assert not fuses("auto", side, side - 1) and fuses("auto", side, side)
        assert fuses("fused", 1, 1) and not fuses("plain", 10**5, 10**5)
    assert fuses("auto", 512, 512) == (jax.default_backend() != "cpu")
