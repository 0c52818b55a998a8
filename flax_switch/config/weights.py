"""The forms that a model's kernels are held in: floats, or integers with scales (`SwitchConfig.weights`).

int8    one scale for each output: values [..., F, D] from -127 to 127, scales [..., F, 1]
int4    one scale for each output and group of 64 inputs: values from -8 to 7, plus 8, two in a byte of [..., F, D / 64, 32], and
        scales [..., F, D / 64, 1]. Byte i of a group has its input i in the low half, and input i + 32 in the high half

A kernel of floats [..., D, F] has its inputs first; integers have them last, which CPUs multiply faster. A weight is its value
times its scale. Scales are float32, of int4 bfloat16: they are many, and what they lose is far below what four bits do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WEIGHTS = ("float", "int8", "int4")
KERNELS = ("auto", "integers", "floats")  # how quantised kernels are held in memory
GROUP = 64  # inputs that share a scale in int4
# Kernels of attention that are int8 in an int4 model: four bits there cost more than everywhere else together. Those of a decoder's
# self-attention lose next to nothing by four bits beside attention to an encoder; of a decoder alone values and outputs are int8.
FINE = {"attention": ("value", "out"), "encoder_decoder_attention": ("query", "value", "out")}
FINE_ALONE = {"self_attention": ("value", "out")}  # of a decoder alone
SCALE = "_scale"  # what the name of a kernel's scales ends with
BIAS = "_bias"  # what the name of an MLP's bias ends with, where it lies among its kernels


class Stored(NamedTuple):
    """Shapes and dtypes of a quantised kernel's values and scales, and the logical axes of both."""

    values: tuple[int, ...]
    scale: tuple[int, ...]
    dtype: str
    scale_dtype: str
    axes: tuple[str | None, ...]


def stored(shape: Sequence[int], weights: str, axes: Sequence[str | None] | None = None) -> Stored:
    """Returns how a kernel [..., D, F] with some logical axes is held in "int8" or "int4"."""
    *lead, inputs, outputs = shape
    *before, input_axis, output_axis = axes or [None] * len(shape)
    if weights == "int8":
        return Stored((*lead, outputs, inputs), (*lead, outputs, 1), "int8", "float32", (*before, output_axis, input_axis))
    rows = (*lead, outputs, inputs // GROUP)
    return Stored((*rows, GROUP // 2), (*rows, 1), "uint8", "bfloat16", (*before, output_axis, input_axis, None))


def kernel_shape(values: Sequence[int], *, packed: bool) -> tuple[int, ...]:
    """Returns the shape [..., D, F] of the kernel that values stand for. packed: whether they are int4."""
    if not packed:
        *lead, outputs, inputs = values
        return (*lead, inputs, outputs)
    *lead, outputs, groups, _ = values
    return (*lead, groups * GROUP, outputs)
