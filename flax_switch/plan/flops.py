"""FLOPs of a compiled program's matrix products, by its HLO text; those of a model by its config are in `config/flops`."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from flax_switch.plan.hlo import Instruction, UnknownText, executions, read_computations, shape_of

# Pallas kernels: the grouped GEMM, ours or JAX's, whose factors come last, and attention, of queries and keys before others.
_GROUPED = re.compile(r'op_name="[^"]*/grouped_(?:rows|gradients)/(?:[^"]*/)?(?:pallas_call|mpmd_map)"')
_ATTENTION = re.compile(r'op_name="[^"]*\bfused_attention(_gradient)?\)*/pallas_call"')


def program_flops(hlo_text: str) -> tuple[float, bool]:
    """Returns FLOPs of a compiled program's matrix products on each device, loops multiplied by their trip counts.

    Returns the count and whether it is complete: a loop whose length is not known counts once. XLA's own analysis counts every
    loop's body once, and elementwise operations beside the products. Products inside custom calls that are not our kernels
    (libraries) are invisible here as there. Raises `UnknownText` for a product in a form that is not known here.
    """
    computations, entry = read_computations(hlo_text)
    runs = executions(computations, entry)
    total, complete = 0.0, True
    for name, instructions in computations.items():
        products = [i for i in instructions if _is_product(i)]
        if not products:
            continue
        shapes = {i.name: shape_of(i.type) for i in instructions}
        count = runs[name]
        complete &= count is not None
        total += (1 if count is None else count) * sum(_product_flops(i, shapes) for i in products)
    return total, complete


def _is_product(instruction: Instruction) -> bool:
    kernel = instruction.opcode == "custom-call" and any(p.search(instruction.attributes) for p in (_GROUPED, _ATTENTION))
    return kernel or instruction.opcode == "convolution" or instruction.opcode.rpartition("-")[2] == "dot"


def _product_flops(product: Instruction, shapes: dict[str, tuple[int, ...]]) -> float:
    factors = product.operand_names[-2:] if _GROUPED.search(product.attributes) else product.operand_names
    left, right = ([shapes.get(name) for name in factors] + [None, None])[:2]
    if left is None or right is None:
        raise UnknownText("the factors of a product", f"{product.opcode}({product.operands})")
    if attention := _ATTENTION.search(product.attributes):  # logits and output, or logits again and four gradients
        return 2.0 * (5 if attention.group(1) else 2) * math.prod(left) * right[-1]
    out = shape_of(product.type)
    if product.opcode == "custom-call":
        rows, contracted = left
        return 2.0 * rows * contracted * out[-1]
    if product.opcode == "dot":
        contracted, batch = (_axes(product.attributes, name) for name in ("lhs_contracting_dims", "lhs_batch_dims"))
        if len(out) != len(left) + len(right) - 2 * len(contracted) - len(batch):
            raise UnknownText("a product's axes", f"dot({product.operands}){product.attributes}")
        return 2.0 * math.prod(out) * math.prod(left[a] for a in contracted)
    if product.opcode != "convolution":
        raise UnknownText("a product", f"{product.opcode}({product.operands}){product.attributes}")
    return _convolution_flops(product.attributes, left, right, out)


def _axes(attributes: str, name: str) -> list[int]:
    """Returns the axes that an attribute lists; XLA leaves out attributes that list none."""
    match = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(axis) for axis in match.group(1).split(",") if axis] if match else []


def _convolution_flops(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Returns the FLOPs of a convolution. TPU programs write products so, batch axes as dilated windows that meet one input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise UnknownText("a convolution's axes", f"convolution{attributes}")
    inputs, kernel, outputs = labels.groups()
    batch_groups = re.search(r"batch_group_count=(\d+)", attributes)
    fma = right[kernel.index("i")] * out[outputs.index("f")] * left[inputs.index("b")]
    if batch_groups:
        fma //= int(batch_groups.group(1))
    spatial = sorted(label for label in kernel if label.isdigit())
    for label, window in zip(spatial, _windows(attributes, len(spatial)), strict=True):
        fma *= _meetings(left[inputs.index(label)], out[outputs.index(label)], **window)
    return 2.0 * fma


def _windows(attributes: str, dimensions: int) -> list[dict[str, int]]:
    """Returns size, stride, lower padding and dilations of the window in each spatial dimension."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=([-\w]+)", text.group(1))) if text else {}

    def values(name: str, default: int) -> list[int]:
        parts = fields[name].split("x") if name in fields else [str(default)] * dimensions
        return [int(part.split("_")[0]) for part in parts]

    names = {"size": ("size", 1), "stride": ("stride", 1), "low": ("pad", 0), "left": ("lhs_dilate", 1), "right": ("rhs_dilate", 1)}
    columns = {key: values(*source) for key, source in names.items()}
    return [{key: column[d] for key, column in columns.items()} for d in range(dimensions)]


@functools.cache
def _meetings(length: int, out: int, *, size: int, stride: int, low: int, left: int, right: int) -> int:
    """Returns how many pairs of an output place and a window place meet an input, not padding or the holes of a dilation."""
    if (size, stride, low, left) == (1, 1, 0, 1):
        return out
    places, reach = np.arange(out) * stride - low, (length - 1) * left
    return sum(int(((at >= 0) & (at <= reach) & (at % left == 0)).sum()) for at in (places + k * right for k in range(size)))
