"""Compares a grouped GEMM with numpy, expert by expert: what an average would hide."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # relative
# Uneven groups, some of them empty; rows that are in none, and no number that 8 divides; widths that every kernel's tiles divide.
_ROWS, _SPARE, _WIDTHS = (70, 0, 129, 1, 56, 0, 200), 21, (128, 256)
NOBODY = -1  # in the place of an expert: the rows that are in no group

Pair = tuple[Callable[..., Array], Callable[..., Array]]  # the product of rows, and the gradient of the kernels


class KernelCheck(NamedTuple):
    """One implementation's largest relative error of any expert, and which expert that was."""

    implementation: str
    dtype: str
    product: str  # "forward", "gradient of inputs" or "gradient of kernels"
    error: float
    expert: int
    problem: str = ""  # why there is no product

    @property
    def fine(self) -> bool:
        """Whether the error is rounding."""
        return self.error < TOLERANCES[self.dtype]

    @property
    def verdict(self) -> str:
        """In words, whose product is wrong."""
        if self.fine:
            return "fine"
        if self.problem:
            return f"FAILED: {self.problem}"
        return "WRONG for rows of no expert" if self.expert == NOBODY else f"WRONG for expert {self.expert}"


def check_products(implementation: str, pair: Pair, dtype: str) -> list[KernelCheck]:
    """Runs the products of a pair, compiled, and compares each expert's with the exact one, and rows of no expert with zeros.

    Callable while a program is traced. A product that cannot be made has an infinite error and a problem.
    """
    rng, sizes = np.random.default_rng(0), np.asarray(_ROWS, np.int32)
    num_rows = int(sizes.sum()) + _SPARE
    shapes = ((num_rows, _WIDTHS[0]), (len(sizes), *_WIDTHS), (num_rows, _WIDTHS[1]))
    x, kernel, gradient = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    multiply, sum_gradients = pair
    products = {
        "forward": (lambda x, kernel, sizes: multiply(x, kernel, sizes, transpose=False), (x, kernel, sizes)),
        "gradient of inputs": (lambda x, kernel, sizes: multiply(x, kernel, sizes, transpose=True), (gradient, kernel, sizes)),
        "gradient of kernels": (sum_gradients, (x, gradient, sizes)),
    }
    wide = [array.astype(np.float64) for array in (x, kernel, gradient)]
    checks = []
    for product, (function, args) in products.items():
        try:
            # Compiled by itself: called in the usual way, it would become a part of whatever program is being traced. Accelerators
            # multiply float32 as TF32 or bfloat16 unless told otherwise.
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args)).compile()
            found = np.asarray(compiled(*args)).astype(np.float64)
        except Exception as error:  # whatever a compiler says, it belongs in the report
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            checks.append(KernelCheck(implementation, dtype, product, float("inf"), NOBODY, problem))
            continue
        checks.append(KernelCheck(implementation, dtype, product, *_worst(product, found, wide)))
    return checks


def _worst(product: str, found: np.ndarray, operands: list[np.ndarray]) -> tuple[float, int]:
    """Returns the largest relative error, and whose it is."""
    ends = np.cumsum(_ROWS)
    rows = [slice(end - size, end) for size, end in zip(_ROWS, ends, strict=True)]
    of_kernels = product == "gradient of kernels"
    pairs = {e: (found[e if of_kernels else own], _exact(product, operands, own, e)) for e, own in enumerate(rows)}
    if not of_kernels:
        pairs[NOBODY] = found[ends[-1] :], np.zeros_like(found[ends[-1] :])
    errors = {e: _relative(*pair) for e, pair in pairs.items()}
    worst = max(errors, key=lambda e: errors[e])
    return errors[worst], worst


def _exact(product: str, operands: list[np.ndarray], rows: slice, expert: int) -> np.ndarray:
    x, kernel, gradient = operands
    if product == "forward":
        return x[rows] @ kernel[expert]
    return gradient[rows] @ kernel[expert].T if product == "gradient of inputs" else x[rows].T @ gradient[rows]


def _relative(found: Float[np.ndarray, "A B"], wanted: Float[np.ndarray, "A B"]) -> float:
    """Returns the norm of the difference over the wanted norm; where nothing is wanted, whatever is not zero counts in full."""
    error = float(np.linalg.norm(found - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)
    return error if np.isfinite(error) else float("inf")
