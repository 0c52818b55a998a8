"""Switch Transformers in JAX and Flax.

Public names are imported when they are first used (PEP 562), so that reading a config or preparing data never starts JAX.
"""

import importlib

__version__ = "0.1.0"  # setup.cfg reads it here, without importing the package

_HOME = {
    "ConfigError": "flax_switch.config",
    "SwitchConfig": "flax_switch.config",
    "PRESETS": "flax_switch.presets",
    "SwitchTransformer": "flax_switch.nn.transformer",
    "SwitchEncoder": "flax_switch.nn.transformer",
    "ModelOutput": "flax_switch.nn.outputs",
    "seq2seq_loss": "flax_switch.ops.losses",
    "LossOutput": "flax_switch.ops.losses",
    "generate": "flax_switch.generation.generate",
    "GenerationOutput": "flax_switch.generation.generate",
    "CheckpointError": "flax_switch.convert",
    "Pretrained": "flax_switch.pretrained",
    "load_pretrained": "flax_switch.pretrained",
    "save_pretrained": "flax_switch.pretrained",
}  # public name -> the module that defines it

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
