"""Compares this platform's grouped GEMMs with numpy, expert by expert: what an average would hide."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_switch.ops.kernels import grouped

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # relative; TPUs multiply float32 in several passes of bfloat16
_ROWS, _WIDTHS = (70, 0, 129, 1, 56), (64, 96)  # uneven groups, one of them empty
_HERE = {"tpu": "ragged_dot", "gpu": "triton"}  # what runs on this platform beside "blocks"


class KernelCheck(NamedTuple):
    """One implementation's largest relative error of any expert, and which expert that was."""

    implementation: str
    dtype: str
    product: str  # "forward", "gradient of inputs" or "gradient of kernels"
    error: float
    expert: int

    @property
    def fine(self) -> bool:
        """Whether the error is rounding."""
        return self.error < TOLERANCES[self.dtype]


def check_grouped() -> list[KernelCheck]:
    """Runs every implementation that this platform has, in float32 and bfloat16. Errors of a compiler are raised."""
    names = ("blocks", *([_HERE[jax.default_backend()]] if jax.default_backend() in _HERE else []))
    return [check for name in names for dtype in TOLERANCES for check in _check(name, dtype)]


def _check(name: str, dtype: str) -> list[KernelCheck]:
    rng, sizes = np.random.default_rng(0), np.asarray(_ROWS)
    shapes = ((sizes.sum(), _WIDTHS[0]), (len(sizes), *_WIDTHS), (sizes.sum(), _WIDTHS[1]))
    x, kernel, gradient = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    multiply, sum_gradients = grouped.IMPLEMENTATIONS[name]
    groups = jnp.asarray(sizes, jnp.int32)
    found = {
        "forward": jax.jit(lambda: multiply(x, kernel, groups, transpose=False))(),
        "gradient of inputs": jax.jit(lambda: multiply(gradient, kernel, groups, transpose=True))(),
        "gradient of kernels": jax.jit(lambda: sum_gradients(x, gradient, groups))(),
    }
    wide = [np.asarray(array, np.float64) for array in (x, kernel, gradient)]
    ends = np.cumsum(sizes)
    checks = []
    for product, result in found.items():
        wanted = [_exact(product, wide, slice(end - size, end), e) for e, (size, end) in enumerate(zip(sizes, ends, strict=True))]
        result = np.asarray(result, np.float64)
        parts = list(result) if product == "gradient of kernels" else np.split(result, ends[:-1])
        errors = [_relative(part, want) for part, want in zip(parts, wanted, strict=True)]
        worst = int(np.argmax(errors))
        checks.append(KernelCheck(name, dtype, product, errors[worst], worst))
    return checks


def _exact(product: str, operands: list[np.ndarray], rows: slice, expert: int) -> np.ndarray:
    x, kernel, gradient = operands
    if product == "forward":
        return x[rows] @ kernel[expert]
    return gradient[rows] @ kernel[expert].T if product == "gradient of inputs" else x[rows].T @ gradient[rows]


def _relative(found: Float[np.ndarray, "A B"], wanted: Float[np.ndarray, "A B"]) -> float:
    """Returns the norm of the difference over the wanted norm; for an expert without rows, whatever is not zero counts in full."""
    error = float(np.linalg.norm(found - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)
    return error if np.isfinite(error) else float("inf")
