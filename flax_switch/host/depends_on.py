"""What a compiled program depends on besides the text that it is compiled from: versions, devices, and flags of the compiler."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import flax_switch
from flax_switch.host.compile_cache import machine

_COMPILERS = {"tpu": ("libtpu",)}  # packages with a compiler of their own, by platform
_OF_NO_PROGRAM = ("--xla_force_host_platform_device_count", "--xla_dump")  # flags that change nothing in it


def depends_on(devices: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Returns "versions", "devices" and "flags" of a program for these devices, in the order in which it numbers them; as in JSON.

    The devices may be described ones. Of TPUs it is also told which chip has which number, and of a CPU what it can do.
    """
    first = devices[0]
    versions = {"flax_switch": flax_switch.__version__}
    for package in ("jax", "jaxlib", *_COMPILERS.get(first.platform, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = {"platform": first.platform, "kind": first.device_kind, "number": len(devices)}
    found |= machine() if first.platform == "cpu" else {"order": [_place(device) for device in devices]}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_OF_NO_PROGRAM)]
    libtpu = os.environ.get("LIBTPU_INIT_ARGS", "") if first.platform == "tpu" else ""
    return {
        "versions": versions,
        "devices": found,
        "flags": {"XLA_FLAGS": " ".join(sorted(flags)), "LIBTPU_INIT_ARGS": libtpu},
    }


def _place(device: Any) -> list[int]:
    """Returns where a device is: the slice, its coordinates there, and the core."""
    return [getattr(device, "slice_index", 0) or 0, *getattr(device, "coords", ()), getattr(device, "core_on_chip", 0) or 0]
