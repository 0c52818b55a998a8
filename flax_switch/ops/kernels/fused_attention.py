"""Fused attention: no array has query and key axes together, forward or backward, in either the logits, the bias or the mask.

The bias comes as its table, masks as what they are made of (`visible.Visible`). Logits are computed block by block, and again in
the backward pass; what is kept in between is the output and two numbers a row. In float32 that is the plain form
(`ops/kernels/attention`) up to the order of sums: masks are added, so rows with nothing to attend to keep the mean of all keys.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_switch.config import one_of
from flax_switch.host.compilers import can_compile_for
from flax_switch.ops.kernels import Size, attention, fused_attention_cudnn, platforms
from flax_switch.ops.kernels import fused_attention_blocks as blocks
from flax_switch.ops.kernels.fused_attention_blocks import Operands
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible

# From how many pairs of a query and a key on "auto" fuses: on a CPU where it costs no time (benchmarks/results/attention_cpu.json),
# elsewhere where they fill a TPU's smallest block.
PAIRS = {"cpu": 1024 * 1024, "other": 128 * 128}


def fused_attention(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    bias: RelativeBias | None,
    visible: Visible,
    keep: Float[Array, "B H 1 T"] | None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B H Q K"]:
    """Returns attention's output.

    keep: 0 for dropped keys, 1 / (1 - rate) for the others; after softmax it multiplies weights, which is as much as values.
    implementation: one of IMPLEMENTATIONS; by default the fastest for the platform that the program is compiled for.
    """
    if implementation is not None:
        one_of("implementation", implementation, tuple(IMPLEMENTATIONS))
    if implementation == "reference":
        return _reference(query, key, value, bias, visible, keep)
    if keep is not None:
        value = value * keep.swapaxes(2, 3)
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](query, key, value, bias, visible)
    if can_compile_for("cuda") and fused_attention_cudnn.takes(query, visible):
        both = {"cudnn": fused_attention_cudnn.attend, "own": functools.partial(_own, None)}
        return platforms.run(both, {"cuda": "cudnn", "other": "own"}, None, query, key, value, bias, visible)
    return _own(None, query, key, value, bias, visible)


def fuses(asked: str, query_length: Size, key_length: Size) -> bool:
    """Returns whether attention of these lengths is fused, by what a config asks for: one of its ATTENTION_IMPLEMENTATIONS.

    "auto" goes by the number of logits and the platform. Lengths that are symbols, of exported programs, are never fused.
    """
    if asked == "plain" or not (isinstance(query_length, int) and isinstance(key_length, int)):
        return False
    return asked == "fused" or query_length * key_length >= PAIRS.get(platforms.target(), PAIRS["other"])


def _reference(query, key, value, bias, visible, keep):
    Q, T = query.shape[2], key.shape[2]
    return attention.attend(
        query, key, value, None if bias is None else bias.array(Q, T), visible.array(Q, T), keep, implementation="reference"
    )[0]  # fmt: skip


def _own(implementation: str | None, query: Array, key: Array, value: Array, bias: RelativeBias | None, visible: Visible) -> Array:
    diagonals = None if bias is None else bias.diagonals(query.shape[2], key.shape[2])
    operands = Operands(query, key, value, diagonals, *visible.codes(), visible.prefix_mask)
    return _recomputed(operands, visible.causal, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _recomputed(operands: Operands, causal: bool, implementation: str | None) -> Array:
    return _forward(operands, causal, implementation)[0]


def _forward(operands: Operands, causal: bool, implementation: str | None) -> tuple[Array, tuple[Any, ...]]:
    passes = {name: functools.partial(each, "forward", causal=causal) for name, each in PASSES.items()}
    output, peak, total = platforms.run(passes, DEFAULT, implementation, operands)
    return output, (operands, output, peak, total)


def _backward(causal: bool, implementation: str | None, residuals: tuple[Any, ...], d_output: Array) -> tuple[Operands]:
    operands, output, peak, total = residuals
    delta = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)
    passes = {name: functools.partial(each, "backward", causal=causal) for name, each in PASSES.items()}
    d_query, d_key, d_value, d_diagonals = platforms.run(
        passes, DEFAULT, implementation, operands, peak, total, delta, d_output
    )  # fmt: skip
    (query, key, value, *_), none = operands, (None, None, None)
    return (
        Operands(d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), d_diagonals, *none),
    )  # fmt: skip


_recomputed.defvjp(_forward, _backward)


def _in_plain_jax(name: str, *args: Any, **options: Any) -> Any:
    return getattr(blocks, name)(*args, **options)


def _in_mosaic(name: str, *args: Any, **options: Any) -> Any:
    """Calls a function of `fused_attention_mosaic`, which imports Pallas, and is imported only when one is called."""
    return getattr(importlib.import_module("flax_switch.ops.kernels.fused_attention_mosaic"), name)(*args, **options)


PASSES: dict[str, Callable[..., Any]] = {"blocks": _in_plain_jax, "mosaic": _in_mosaic}
DEFAULT = {"tpu": "mosaic", "other": "blocks"}
IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": _reference,
    **{name: functools.partial(_own, name) for name in PASSES},
    "cudnn": fused_attention_cudnn.attend,
}
