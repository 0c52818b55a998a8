"""Adapters of a model that is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flax_switch.config import ConfigError, expect
from flax_switch.convert.adapter import Adapter, check_base, check_fits, merged
from flax_switch.convert.adapter_folder import open_adapter, open_adapter_of
from flax_switch.convert.canonical import flatten, is_expert, unflatten
from flax_switch.convert.checkpoint import Checkpoint
from flax_switch.convert.scan import stack_layers
from flax_switch.generation.defaults import read_prefixes
from flax_switch.nn.adapter import kernel_norms, without_adapter
from flax_switch.parallel.mesh import replicated
from flax_switch.pretrained.saving import unscanned

if TYPE_CHECKING:
    from flax_switch.pretrained.model import Pretrained


class Held(NamedTuple):
    """An adapter, and its arrays where the model's are, b scaled: what `nn.adapter.adapted` takes."""

    adapter: Adapter
    tree: dict[str, Any]


def load_adapter(path: str | Path, pretrained: Pretrained) -> Adapter:
    """Opens an adapter for a model: a folder of PEFT's or ours, or a run that trains one. Headers are read.

    Raises:
      CheckpointError: where it is another model's: the message names what does not fit.
    """
    adapter = open_adapter(path, pretrained.config, pretrained.architecture)
    check_base(path, adapter, flatten(pretrained.params), pretrained.config)
    return dataclasses.replace(adapter, prefixes=read_prefixes(path))


def adapter_of(path: str | Path, opened: Checkpoint, *, verify: bool = True) -> Adapter:
    """Opens an adapter for a checkpoint that is open; raises as `load_adapter`. verify: as for `load_pretrained`."""
    return dataclasses.replace(open_adapter_of(path, opened, verify=verify), prefixes=read_prefixes(path))


def held(adapter: Any, name: str, pretrained: Pretrained) -> Held:
    """Reads an adapter, or the one in a folder, into memory for a model."""
    if isinstance(adapter, (str, os.PathLike)):
        adapter = load_adapter(Path(adapter), pretrained)
    else:
        expect("adapter", adapter, Adapter, "Give a folder, or what fs.load_adapter(folder, model) returns.")
        check_fits(f"The adapter {name!r}", adapter, pretrained.config, pretrained.architecture)
        check_base(f"The adapter {name!r}", adapter, flatten(pretrained.params), pretrained.config)
    params, arrays = without_adapter(pretrained.params), {}
    for path in adapter.kernels:
        for part, array in zip(("a", "b", "magnitude"), adapter.parts(path), strict=True):
            if array is not None:
                arrays[f"{path}/{part}"] = array
    if pretrained.config.scan_layers:
        arrays = _stacked(arrays, pretrained)
    arrays = {path: _with_all_magnitudes(path, array, adapter, params) for path, array in arrays.items()}
    mesh = mesh_of(params)
    return Held(adapter, unflatten(jax.device_put(arrays, None if mesh is None else replicated(mesh))))


def _stacked(arrays: Mapping[str, np.ndarray], pretrained: Pretrained) -> dict[str, Any]:
    try:
        return stack_layers(arrays, pretrained.config)
    except (KeyError, ValueError) as error:  # layers without a part, or with another rank
        raise ConfigError(
            "Scanned layers need an adapter for the same kernels, of one rank, in each of them; this one differs between layers. "
            "Load the model with scan_layers=False."
        ) from error


def _with_all_magnitudes(path: str, array: Any, adapter: Adapter, params: Mapping[str, Any]) -> Any:
    """Gives experts that have no adapter the magnitudes that they have."""
    kernel, _, part = path.rpartition("/")
    if part != "magnitude" or not is_expert(kernel) or kernel not in adapter.kernels:
        return array
    has = np.array(adapter.kernels[kernel].ranks)[:, None] > 0
    return array if has.all() else jnp.where(has, array, kernel_norms(params, kernel))


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that parameters lie on."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None


def merged_model(pretrained: Pretrained, adapter: Adapter) -> Pretrained:
    """Returns the model with an adapter in its kernels, and none beside them."""
    from flax_switch.pretrained.loading import built_of

    config, params = pretrained.config, without_adapter(pretrained.params)
    built = built_of(pretrained, config, merged(adapter, config, unscanned(config, params)))
    return built.replace(prefixes=adapter.prefixes or pretrained.prefixes)
