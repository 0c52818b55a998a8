"""Switch Transformers in JAX and Flax."""

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.presets import PRESETS

__all__ = ["ConfigError", "PRESETS", "SwitchConfig"]
