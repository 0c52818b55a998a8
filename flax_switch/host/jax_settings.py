"""What JAX is set to, read in a way that type checkers take under every JAX."""

from __future__ import annotations

from typing import Any


def jax_setting(name: str) -> Any:
    """Returns the value of a setting such as "jax_platforms"."""
    import jax

    return getattr(jax.config, name)
