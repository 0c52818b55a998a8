"""Switch Transformers in JAX and Flax.

Public names are imported when they are first used (PEP 562), so that reading a config or preparing data never starts JAX.
"""

import importlib

_HOME = {
    "ConfigError": "flax_switch.config",
    "SwitchConfig": "flax_switch.config",
    "PRESETS": "flax_switch.presets",
}  # public name -> the module that defines it

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
