"""A model of transformers that is in memory, by duck typing: neither torch nor transformers is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig
from flax_switch.convert import huggingface
from flax_switch.convert.tensors import DTYPES, CheckpointError, Index, LazyTensor, dtype_name
from flax_switch.host.foreign_arrays import from_torch


def is_live(source: Any) -> bool:
    """Returns whether a source is a model of transformers rather than the name of one."""
    return hasattr(source, "state_dict") and hasattr(source, "config")


def read_live(model: Any, *, allow_missing: Sequence[str] = ()) -> tuple[SwitchConfig, str, dict[str, LazyTensor]]:
    """Returns the config, architecture and canonical tensors of a model; a tensor is copied to the host when it is read.

    Raises `ConfigError` for a model that is neither SwitchTransformers nor T5, and `CheckpointError` for tensors that do not fit.
    """
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype_name(model.dtype)}
    tensors = {name: _lazy(name, tensor) for name, tensor in model.state_dict().items()}
    return huggingface.assemble(SwitchConfig.from_huggingface(values), values, tensors, allow_missing=allow_missing)


def generation_values(model: Any) -> Mapping[str, Any]:
    """Returns what a model's generation_config.json would say."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else config.to_diff_dict()


def _lazy(name: str, tensor: Any) -> LazyTensor:
    dtype = DTYPES.get(dtype_name(tensor.dtype))
    if dtype is None:
        raise CheckpointError(f"{name} of the model has dtype {tensor.dtype}; known are {', '.join(DTYPES)}.")

    def read(index: Index) -> np.ndarray:
        return from_torch(tensor[index]).astype(dtype, copy=False)

    return LazyTensor(tuple(tensor.shape), dtype, read)
