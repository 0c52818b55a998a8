"""Which accelerators programs can be compiled for here, told by what is installed, without starting JAX."""

from __future__ import annotations

import importlib.util

PACKAGES = {  # any one of them will do
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "rocm": ("jax_rocm7_plugin",),
}


def can_compile_for(platform: str) -> bool:
    """Returns whether a compiler for the platform, as JAX names it in lowering, is installed; none of them needs the device."""
    return any(importlib.util.find_spec(package) for package in PACKAGES[platform])
