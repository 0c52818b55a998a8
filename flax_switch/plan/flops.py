"""FLOPs of matrix products: of a model by its config, and of a compiled program by its HLO text."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.plan.hlo import Instruction, UnknownText, executions, read_computations, shape_of

_GROUPED = re.compile(r'op_name="[^"]*/grouped_(?:rows|gradients)/pallas_call"')
BACKWARD = 2  # gradients take two products for each one of the forward pass


def forward_flops(config: SwitchConfig, batch: int, source: int, target: int) -> float:
    """Returns FLOPs of the model's own matrix products in one forward pass over `batch` pairs of `source` and `target` tokens.

    A product of [M, K] and [K, N] counts 2 M K N. Each token counts its N experts once: neither what capacity adds in empty
    slots, nor recomputation, nor what executors do to move tokens. Every position counts, padding too. Causal attention counts
    whole squares, as it is computed.
    """
    encoder = _stack_flops(config, config.encoder, source, source)
    decoder = _stack_flops(config, config.decoder, target, source) + 2 * target * config.d_model * config.vocab_size
    return float(batch * (encoder + decoder))


def train_flops(config: SwitchConfig, batch: int, source: int, target: int) -> float:
    """Returns FLOPs of a train step: the forward pass and twice as much for the gradients."""
    return (1 + BACKWARD) * forward_flops(config, batch, source, target)


def _stack_flops(config: SwitchConfig, stack: StackConfig, length: int, source: int) -> int:
    """Returns the FLOPs of one sequence of `length` tokens; a decoder attends to `source` encoded ones, too."""
    D, HK = config.d_model, config.num_heads * config.d_kv
    kernels = 3 if config.is_gated else 2
    attention = 2 * length * 4 * D * HK + 2 * length * 2 * length * HK
    if stack.name == "decoder":
        attention += 2 * (2 * length + 2 * source) * D * HK + 2 * length * 2 * source * HK
    dense = 2 * length * kernels * D * config.d_ff
    expert = 2 * length * kernels * D * config.expert_width
    sparse = 2 * length * D * config.num_experts + expert * (config.num_selected_experts + config.shared_expert)
    sparse += dense * config.extra_mlp
    return stack.num_layers * attention + stack.num_sparse * sparse + (stack.num_layers - stack.num_sparse) * dense


def program_flops(hlo_text: str) -> tuple[float, bool]:
    """Returns FLOPs of a compiled program's matrix products on each device, loops multiplied by their trip counts.

    Returns the count and whether it is complete: a loop whose length is not known counts once. XLA's own analysis counts every
    loop's body once, and elementwise operations beside the products. Products inside custom calls (Pallas kernels, libraries)
    are invisible here as there. Raises `UnknownText` for a product in a form that is not known here.
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
    grouped = instruction.opcode == "custom-call" and _GROUPED.search(instruction.attributes)
    return bool(grouped) or instruction.opcode == "convolution" or instruction.opcode.rpartition("-")[2] == "dot"


def _product_flops(product: Instruction, shapes: dict[str, tuple[int, ...]]) -> float:
    left, right = ([shapes.get(name) for name in product.operand_names] + [None, None])[:2]
    out = shape_of(product.type)
    if left is None or right is None:
        raise UnknownText("the factors of a product", f"{product.opcode}({product.operands})")
    if product.opcode == "custom-call":  # its first operand is of index arrays
        rows, contracted = right
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
