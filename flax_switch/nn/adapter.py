"""Adapters as trees of parameters beside a model's: {"encoder": {... {"kernel": {"a": ..., "b": ..., "magnitude": ...}}}}.

Paths are those of the model's kernels. Where layers are scanned, each part has the layer axis second, as kernels have.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from flax_switch.config import check
from flax_switch.config.adapter import AdapterConfig, column_norms, matrix, part_shapes
from flax_switch.config.weights import SCALE
from flax_switch.nn.init import abstract_params, logical_axes
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.dropout import dropout as dropped
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.on_disk import OnDisk
from flax_switch.ops.kernels.quantized import Quantized, dequantized, with_scale

SCAN_AXIS = 1


class Part(NamedTuple):
    """One of an adapter's arrays: its shape, and its logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def adapter_parts(model: SwitchEncoder, config: AdapterConfig) -> dict[str, Part]:
    """Returns the arrays of a model's adapter by path ("encoder/layers_0/attention/query/kernel/a"); allocates nothing."""
    floats = model.clone(config=model.config.replace(weights="float"))
    shapes, axes = map(_flat, (abstract_params(floats), logical_axes(floats)))
    parts = {}
    for path in config.kernels(shapes):
        shape, names, scanned = shapes[path].shape, axes[path], is_scanned(path)
        if scanned:
            (shape, count), (names, layers) = (_apart(values) for values in (shape, names))
        lead = names[: int("/expert/" in path)]
        plain = len(shape) - len(lead) == 2  # else there are several axes of inputs or outputs, which stay whole
        inputs, outputs = names[-2:] if plain else (None, None)
        ends = {"a": (inputs, None), "b": (None, outputs), "magnitude": (outputs,)}
        for name, size in part_shapes(path, shape, config.rank, dora=config.use_dora).items():
            part = Part(size, (*lead, *ends[name]))
            if scanned:
                part = Part(*(_with(values, one) for values, one in zip(part, (count, layers), strict=True)))
            parts[f"{path}/{name}"] = part
    return parts


def is_scanned(path: str) -> bool:
    """Returns whether a parameter is a stack of those of all layers of a kind."""
    return "/subblock_" in path


def _apart(values: tuple) -> tuple[tuple, Any]:
    return values[:SCAN_AXIS] + values[SCAN_AXIS + 1 :], values[SCAN_AXIS]


def _with(values: tuple, one: Any) -> tuple:
    return (*values[:SCAN_AXIS], one, *values[SCAN_AXIS:])


def init_adapter(model: SwitchEncoder, config: AdapterConfig, params: Mapping[str, Any], rng: PRNGKeyArray) -> dict[str, Any]:
    """Returns a fresh adapter, which changes nothing: a is uniform up to D**-0.5, b zero, magnitudes columns' norms."""

    def made(path: str, shape: tuple[int, ...]) -> Array:
        kernel, _, name = path.rpartition("/")
        if name == "b":
            return jnp.zeros(shape)
        if name == "magnitude":
            return kernel_norms(params, kernel)
        bound = shape[-3 if is_scanned(path) and "/expert/" not in path else -2] ** -0.5
        return jax.random.uniform(jax.random.fold_in(rng, zlib.crc32(path.encode())), shape, minval=-bound, maxval=bound)

    return unflatten_dict({path: made(path, part.shape) for path, part in adapter_parts(model, config).items()}, sep="/")


def kernel_norms(params: Mapping[str, Any], path: str) -> Array:
    """Returns the norms of a kernel's columns, which are its magnitudes."""
    flat = _flat(params)
    return _by_layer(path, lambda *leaves: column_norms(_floats(path, *leaves)), *_leaves(flat, path))


def adapted(
    params: Mapping[str, Any],
    adapter: Mapping[str, Any],
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """Returns parameters with `Adapted` kernels in place of those that an adapter has parts for.

    It is differentiable by the adapter. scale: of a b. rng: in training, for dropout, which sets inputs to zero as they are read by
    an adapter, for all tokens the same ones.

    Raises:
      ConfigError: for an adapter of experts that are on disk.
    """
    flat, parts = map(_flat, (params, adapter))
    result = dict(flat)
    for path in dict.fromkeys(name.rpartition("/")[0] for name in parts):
        check(
            not isinstance(flat[path], OnDisk),
            f"The adapter has a part for {path}, and this model's experts are on disk. Load the model without experts='disk'.",
        )
        a, b, magnitude = parts[f"{path}/a"], parts[f"{path}/b"], parts.get(f"{path}/magnitude")
        b, gain = b * scale, None
        if magnitude is not None:
            gain = _by_layer(path, functools.partial(_gain, path), a, b, magnitude, *_leaves(flat, path))
        if rng is not None and dropout > 0.0:
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            a = dropped(a, dropout, key, broadcast_axes=(-1,))
        result[path] = Adapted(flat[path], a, b, gain)
    return unflatten_dict(result, sep="/")


def without_adapter(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters as they were before `adapted`."""
    is_adapted = lambda leaf: isinstance(leaf, (Adapted, OnDisk))  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.base if isinstance(leaf, Adapted) else leaf, dict(params), is_leaf=is_adapted)


def has_adapter(params: Any) -> bool:
    """Returns whether some kernels are `Adapted`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return any(isinstance(leaf, Adapted) for leaf in leaves)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(dict(tree), sep="/"))


def _leaves(flat: Mapping[str, Any], path: str) -> list[Array]:
    """Returns a kernel's array, and its scales if it has any."""
    return [flat[name] for name in (path, path + SCALE) if name in flat]


def _by_layer(path: str, function: Callable[..., Array], *leaves: Array) -> Array:
    return (jax.vmap(function, SCAN_AXIS, SCAN_AXIS) if is_scanned(path) else function)(*leaves)


def _floats(path: str, kernel: Any, scale: Array | None = None) -> Array:
    """Returns a kernel as matrices [(E,) D, F] in float32."""
    kernel = kernel.values if isinstance(kernel, Narrow) else with_scale(kernel, scale)
    kernel = dequantized(kernel) if isinstance(kernel, Quantized) else kernel.astype(jnp.float32)
    return kernel.reshape(matrix(path, kernel.shape))


def _gain(path: str, a: Array, b: Array, magnitude: Array, *leaves: Array) -> Array:
    """Returns what columns are multiplied by to have their magnitudes; norms have no gradient (2402.09353, section 4.3)."""
    norms = column_norms(_floats(path, *leaves) + a @ b)
    return (magnitude / jax.lax.stop_gradient(norms))[..., None, :]
