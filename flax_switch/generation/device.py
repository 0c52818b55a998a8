"""Where parameters lie, which says how decoding steps read them."""

import enum

import jax
import numpy as np


class Device(enum.Enum):
    """Where the parameters lie."""

    PROCESSOR = "one processor"
    ACCELERATOR = "one accelerator"
    MESH = "several devices"


def device_of(params) -> Device:
    """Where parameters lie."""
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, np.ndarray):
        return Device.PROCESSOR if jax.default_backend() == "cpu" else Device.ACCELERATOR
    if len(leaf.sharding.device_set) > 1:
        return Device.MESH
    return Device.PROCESSOR if next(iter(leaf.devices())).platform == "cpu" else Device.ACCELERATOR
