"""Kernels as integers with scales, and back: lazily, so that a float model of any size is quantised a block at a time.

What the integers mean is in `config/weights.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flax_switch.config import SwitchConfig, check, one_of
from flax_switch.config.weights import GROUP, SCALE, WEIGHTS, kernel_shape, stored
from flax_switch.convert.canonical import HEAD, canonical_shapes, is_kernel, is_router, weights_of
from flax_switch.convert.tensors import DTYPES, CheckpointError, Index, LazyTensor, cast, stack, take, transpose

Tensors = Mapping[str, LazyTensor]


def with_weights(config: SwitchConfig, tensors: Tensors, weights: str) -> tuple[SwitchConfig, dict[str, LazyTensor]]:
    """Returns a float model's config and canonical tensors with kernels in another form; routers keep theirs.

    weights: "int8" or "int4", or the name of a float dtype, in which they are stored then and not computed.

    Raises:
      ConfigError: for another name, or for a model whose weights are integers already.
    """
    forms = (*WEIGHTS[1:], *DTYPES)
    one_of("weights", weights, forms)
    check(
        config.weights == "float",
        f"The model has {config.weights} weights already: rounding them again would only add to the error. Start from the float "
        "model, or leave weights out.",
    )
    if weights in DTYPES:
        return config, {path: cast(t, DTYPES[weights]) if is_kernel(path) else t for path, t in tensors.items()}
    config = config.replace(weights=weights)
    return config, quantized(config, tensors)


def quantized(config: SwitchConfig, tensors: Tensors) -> dict[str, LazyTensor]:
    """Returns tensors with every float kernel in the form that `config` has for it."""
    result: dict[str, LazyTensor] = {}
    for path, tensor in tensors.items():
        form = weights_of(path, config)
        if form == "float":
            result[path] = tensor
        else:
            result[path], result[path + SCALE] = _quantized(path, tensor, form)
    return result


def with_copied_head(config: SwitchConfig, tensors: Tensors) -> dict[str, LazyTensor]:
    """Adds the head that a quantised model with tied embeddings has in memory; files do not hold it."""
    values, scale = _quantized(HEAD, transpose(tensors[config.embedding_path]), config.head_weights)
    return {**tensors, HEAD: values, HEAD + SCALE: scale}


def dequantized(config: SwitchConfig, architecture: str, tensors: Tensors) -> tuple[SwitchConfig, dict[str, LazyTensor]]:
    """Returns the config and canonical tensors of the float model that a quantised one computes with, in `param_dtype`."""
    floats = config.replace(weights="float")
    dtype = DTYPES[config.param_dtype]

    def whole(path: str, shape: tuple[int, ...]) -> LazyTensor:
        tensor = tensors[path]
        return tensor if weights_of(path, config) == "float" else _dequantized(tensor, tensors[path + SCALE], shape, dtype)

    return floats, {path: whole(path, shape) for path, shape in canonical_shapes(floats, architecture).items() if path in tensors}


def as_floats(tensors: Tensors, picked: Callable[[Sequence[int]], bool]) -> dict[str, LazyTensor]:
    """Returns tensors with some kernels of integers as the numbers that they mean, in float32; their scales stay beside them.

    picked: says of a kernel's shape [..., D, F] whether it is one of them.
    """
    result = dict(tensors)
    for path, values in tensors.items():
        if path + SCALE in tensors and values.dtype not in DTYPES.values():
            shape = kernel_shape(values.shape, packed=values.dtype == np.uint8)
            if picked(shape):
                result[path] = _dequantized(values, tensors[path + SCALE], shape, DTYPES["float32"])
    return result


def as_integers(config: SwitchConfig, tensors: Tensors) -> dict[str, LazyTensor]:
    """Returns tensors with the kernels that `as_floats` made floats as the integers that they were, to the bit.

    Reading one raises `CheckpointError` where it holds other numbers than integers times its scales.
    """
    held = [path for path, tensor in tensors.items() if path + SCALE in tensors and tensor.dtype in DTYPES.values()]
    return {
        **tensors,
        **{path: _integers(path, tensors[path], tensors[path + SCALE], weights_of(path, config)) for path in held},
    }


def in_dtype(tensors: Tensors, dtype: str) -> dict[str, LazyTensor]:
    """Returns tensors cast to a float dtype: all but routers, and integers with their scales."""
    one_of("dtype", dtype, tuple(DTYPES))
    kept = lambda path, tensor: is_router(path) or path.endswith(SCALE) or tensor.dtype not in DTYPES.values()  # noqa: E731
    return {path: t if kept(path, t) else cast(t, DTYPES[dtype]) for path, t in tensors.items()}


def check_dtypes(config: SwitchConfig, tensors: Tensors) -> None:
    """Raises `CheckpointError` where a kernel's or a scale's dtype is not that of the config's weights."""
    for path, tensor in tensors.items():
        form = weights_of(path.removesuffix(SCALE), config)
        held = None if form == "float" else stored((GROUP, 1), form)
        wanted = "float" if held is None else held.scale_dtype if path.endswith(SCALE) else held.dtype
        fits = tensor.dtype in DTYPES.values() if wanted == "float" else tensor.dtype == wanted
        if not fits:
            raise CheckpointError(f"{path} has dtype {tensor.dtype}, where weights={config.weights!r} means {wanted}")


def _quantized(path: str, tensor: LazyTensor, form: str) -> tuple[LazyTensor, LazyTensor]:
    """Returns a kernel's values and scales, each of which reads the floats that it needs; of experts one at a time."""
    if len(tensor.shape) > 2:
        values, scales = zip(*(_quantized(path, take(tensor, e), form) for e in range(tensor.shape[0])), strict=True)
        return stack(values), stack(scales)
    shapes = stored(tensor.shape, form)

    def read(outputs: slice, groups: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kernel as float32 in groups of inputs that share a scale, [F, groups, inputs], and these scales."""
        size = tensor.shape[0] if form == "int8" else GROUP
        block = tensor.read((slice(groups.start * size, groups.stop * size), outputs))
        block = np.array(block.T, np.float32, order="C").reshape(block.shape[1], -1, size)
        return block, scales_of(path, block, form).astype(DTYPES[shapes.scale_dtype]).astype(np.float32)

    def read_scale(index: Index) -> np.ndarray:
        scale = read(index[0], index[1])[1]
        return (scale[:, 0] if form == "int8" else scale).astype(DTYPES[shapes.scale_dtype])

    def read_values(index: Index) -> np.ndarray:
        kernel, scale = read(index[0], slice(0, 1) if form == "int8" else index[1])
        kernel /= np.where(scale == 0, 1, scale)
        np.rint(kernel, out=kernel)
        if form == "int8":
            return kernel[:, 0].astype(np.int8)[:, index[1]]
        return packed(np.clip(kernel, -8, 7))[..., index[2]]

    return LazyTensor(shapes.values, np.dtype(shapes.dtype), read_values), LazyTensor(
        shapes.scale, DTYPES[shapes.scale_dtype], read_scale
    )


def scales_of(path: str, kernel: np.ndarray, form: str) -> np.ndarray:
    """Returns the scales [F, groups, 1] of a kernel [F, groups, inputs]: they make the largest integer of the largest number.

    int4 has one more integer below zero than above, so that there a scale has the sign that the largest number has not.
    """
    low, high = kernel.min(2, keepdims=True), kernel.max(2, keepdims=True)
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise CheckpointError(f"{path} holds a number that is not finite, for which no integer stands; repair the float model.")
    if form == "int8":
        return np.maximum(-low, high) / np.float32(127)
    return np.where(-low > high, low, high) / np.float32(-8)


def packed(integers: np.ndarray) -> np.ndarray:
    """Returns integers from -8 to 7, [F, groups, 64], two in a byte."""
    values = (integers + 8).astype(np.uint8)
    return values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4


def _integers(path: str, tensor: LazyTensor, scale: LazyTensor, form: str) -> LazyTensor:
    """Returns the values of a kernel that is held as floats; of experts one at a time."""
    if len(tensor.shape) > 2:
        return stack([_integers(path, take(tensor, e), take(scale, e), form) for e in range(tensor.shape[0])])
    shapes = stored(tensor.shape, form)

    def read(index: Index) -> np.ndarray:
        groups = slice(0, 1) if form == "int8" else index[1]
        inputs = index[1] if form == "int8" else slice(groups.start * GROUP, groups.stop * GROUP)
        kernel = np.array(tensor.read((inputs, index[0])).T, np.float32, order="C")
        scales = scale.read((index[0], groups, slice(0, 1))[: len(scale.shape)]).astype(np.float32)
        kernel = kernel.reshape(*scales.shape[:-1], -1)
        integers = np.rint(kernel / np.where(scales == 0, 1, scales))
        if not np.array_equal(integers * scales, kernel):
            raise CheckpointError(f"{path} holds numbers that are not integers times its scales; quantise the float model anew.")
        return integers.astype(np.int8) if form == "int8" else packed(integers)[..., index[2]]

    return LazyTensor(shapes.values, np.dtype(shapes.dtype), read)


def _dequantized(values: LazyTensor, scale: LazyTensor, shape: Sequence[int], dtype: np.dtype) -> LazyTensor:
    """Returns the kernel of a shape that values and scales stand for; of experts one at a time."""
    if len(shape) > 2:
        return stack([_dequantized(take(values, e), take(scale, e), shape[1:], dtype) for e in range(shape[0])])

    def read(index: Index) -> np.ndarray:
        inputs, outputs = index
        if values.dtype == np.int8:
            return (values.read((outputs, inputs)).astype(np.float32) * scale.read((outputs, slice(0, 1)))).T.astype(dtype)
        groups = slice(inputs.start // GROUP, -(-inputs.stop // GROUP))
        packed = values.read((outputs, groups, slice(0, GROUP // 2)))
        integers = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32) - 8
        weights = (integers * scale.read((outputs, groups, slice(0, 1))).astype(np.float32)).reshape(len(integers), -1)
        first = groups.start * GROUP
        return weights[:, inputs.start - first : inputs.stop - first].T.astype(dtype)

    return LazyTensor(tuple(shape), dtype, read)
