"""Products of few rows with large kernels, which is what decoding consists of: they go as fast as the kernels can be read.

Measured on two cores of an x86 processor, float32, kernels of 9 MB: XLA copies a kernel [D, F] into blocks before it multiplies
several rows with it, which takes twice the time of the product with [F, D] as the left factor, where it does not. A single row
is quickest with [D, F]. So a processor that decodes several rows transposes the kernels first, once for all steps.
"""

from __future__ import annotations

import enum

import jax
import numpy as np
from jaxtyping import Array, Float

TRANSPOSE_FROM = 4  # rows


class Device(enum.Enum):
    """Where the parameters lie, which says how steps read them."""

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


def transposes(rows: int, device: Device) -> bool:
    """Whether kernels are kept transposed for products with this many rows."""
    return device is Device.PROCESSOR and rows >= TRANSPOSE_FROM


def lay_out(kernel: Float[Array, "D F"], rows: int, device: Device) -> Float[Array, "D F"] | Float[Array, "F D"]:
    """The kernel as `product` wants it."""
    # The barrier keeps the transposition out of the loop over steps.
    return jax.lax.optimization_barrier(kernel.T) if transposes(rows, device) else kernel


def product(x: Float[Array, "R D"], kernel: Float[Array, "D F"], rows: int, device: Device) -> Float[Array, "R F"]:
    """x times a kernel that `lay_out` prepared for `rows` rows."""
    return few_rows(x, kernel) if transposes(rows, device) else x @ kernel


def few_rows(x: Float[Array, "R D"], transposed: Float[Array, "F D"]) -> Float[Array, "R F"]:
    """x times the transpose of `transposed`, which is read where it lies."""
    return (transposed @ x.T).T
