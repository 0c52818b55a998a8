"""Fused attention for the test of all implementations: what it is run on, and how each runs here, cut into blocks."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.ops.kernels import fused_attention
from flax_switch.ops.kernels import fused_attention_cudnn as cudnn
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible

BLOCK = 16
B, H, K = 2, 2, 8
CASES = {  # lengths of queries and keys, whether biases look both ways (None: no bias), what masks are made of, dropout
    "nothing else, odd lengths": (21, 37, None, (), False),
    "a bias of one way": (37, 21, False, (), False),
    "masks, empty rows, dropout": (21, 37, True, ("query_mask", "key_mask"), True),
    "causal": (37, 37, False, ("query_mask", "causal"), False),
    "causal with a prefix, packed": (37, 37, False, ("key_mask", "segments", "prefix_mask", "causal"), True),
    "cross-attention, packed": (21, 37, None, ("query_mask", "key_mask", "segments"), False),
}


def operands(case, dtype=jnp.float32):
    """What a case runs on: query, key, value and the table; how the table is read, masks, and dropout."""
    Q, T, both_ways, masks, dropout = CASES[case]
    rng = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    arrays = draw(B, H, Q, K), draw(B, H, T, K), draw(B, H, T, K), draw(H, 8).astype(jnp.float32)
    seen = {name: jnp.asarray(rng.random((B, Q if name == "query_mask" else T)) < 0.7) for name in sorted(set(masks) & MASKS)}
    if "segments" in masks:  # in the second row the last target has no source
        segments = {"key": np.sort(rng.integers(0, 3, (B, T)))}
        segments["query"] = segments["key"] if Q == T else np.sort(rng.integers(0, 3 + np.arange(B)[:, None], (B, Q)))
        seen |= {f"{name}_segments": jnp.asarray(ids, jnp.int32) for name, ids in segments.items()}
    keep = jnp.asarray((rng.random((B, H, 1, T)) < 0.5) * 2.0, dtype) if dropout else None
    return arrays, both_ways, Visible(**seen, causal="causal" in masks), keep


MASKS = {"query_mask", "key_mask", "prefix_mask"}


def in_blocks():
    """Makes blocks so small that these cases have several, and interprets the TPU's kernel."""
    passes = fused_attention.PASSES
    small = {"blocks": dict(block=BLOCK), "mosaic": dict(block=BLOCK, interpret=True)}
    return mock.patch.dict(passes, {name: functools.partial(passes[name], **options) for name, options in small.items()})


def fused(implementation, case, dtype=jnp.float32):
    """The output, and gradients of query, key, value and table."""
    arrays, both_ways, visible, keep = operands(case, dtype)
    if implementation == "cudnn" and set(CASES[case][3]) & {"segments", "prefix_mask"}:
        pytest.skip("cuDNN's form has no segments and no prefixes")
    weights = jnp.cos(jnp.arange(B * H * CASES[case][0] * K) + 1.0).reshape(B, H, -1, K)

    def weighted(query, key, value, table):
        bias = None if both_ways is None else RelativeBias(table, both_ways, 12)
        if implementation == "cudnn":
            value = value if keep is None else value * keep.swapaxes(2, 3)
            output = cudnn.attend(query, key, value, bias, visible, implementation="xla")
        else:
            output = fused_attention.fused_attention(query, key, value, bias, visible, keep, implementation=implementation)
        return (output.astype(jnp.float32) * weights).sum(), output

    with in_blocks():
        (_, output), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
    return output, *gradients
