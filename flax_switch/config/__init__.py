"""Every setting of a model, its data, its training and its mesh, as frozen dataclasses that validate themselves.

The dataclasses are the truth: ml_collections and gin files are read into them by `flax_switch.config.recipes`, and Hugging Face's
`config.json` is mapped onto `SwitchConfig` by `flax_switch.config.huggingface`. What is imported here needs nothing but the
standard library, so that data preparation and tools can read a config without starting JAX.
"""

from flax_switch.config.base import ConfigError, check, expect, one_line, one_of, reject_unknown_keys
from flax_switch.config.model import EXECUTORS, ROUTERS, SwitchConfig
from flax_switch.config.run import BatchConfig, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SourceConfig, TrainConfig
from flax_switch.config.stacks import StackConfig, sparse_layers

__all__ = [
    "EXECUTORS",
    "ROUTERS",
    "BatchConfig",
    "ConfigError",
    "DataConfig",
    "ExperimentConfig",
    "MeshConfig",
    "OptimizerConfig",
    "SourceConfig",
    "StackConfig",
    "SwitchConfig",
    "TrainConfig",
    "check",
    "expect",
    "one_line",
    "one_of",
    "reject_unknown_keys",
    "sparse_layers",
]
