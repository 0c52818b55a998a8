"""Rounding that makes up for itself: what the weights of one input lose by it, those of inputs not yet rounded give back.

GPTQ (2210.17323) with groups of inputs in their order. It wants the second moments of the rows x that a kernel K multiplies, and
loses about the least of x K that integers allow.
"""

from __future__ import annotations

import numpy as np

from flax_switch.config.weights import GROUP
from flax_switch.convert.quantize import packed, scales_of
from flax_switch.convert.tensors import DTYPES, CheckpointError

DAMPING = 0.1  # of the mean of the moments' diagonal, added to it: calibration does not tell all
OTHERS = 0.3  # of an average expert's moments, added to those of each: few tokens hit some


def compensated(path: str, kernel: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a kernel's values and scales in int4, or those of a stack of experts, as `config.weights.stored` lays them out.

    kernel: float32 [(E,) D, F]. moments: [(E,) D, D], sums over rows of weighted x^T x, up to a factor.

    Raises:
      CheckpointError: for a kernel or moments that are not finite.
    """
    if not np.isfinite(moments).all():
        raise CheckpointError(
            f"What comes by at {path} is not finite for this calibration, so that nothing can be rounded by it; look at the "
            "float model's outputs."
        )
    if kernel.ndim == 2:
        return _compensated(path, kernel, moments)
    average = moments.mean(0)
    made = [_compensated(path, *pair) for pair in zip(kernel, moments + OTHERS * average, strict=True)]
    values, scales = zip(*made, strict=True)
    return np.stack(values), np.stack(scales)


def _compensated(path: str, kernel: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = kernel.shape
    left, factor = np.array(kernel), _factor(moments)
    integers, scales = np.empty((outputs, inputs), np.float32), []
    for start in range(0, inputs, GROUP):
        stop = start + GROUP
        stored = scales_of(path, left[start:stop].T[:, None], "int4").astype(DTYPES["bfloat16"])  # [F, 1, 1]
        scales.append(stored)
        scale = stored[:, 0, 0].astype(np.float32)
        lost = np.empty((GROUP, outputs), np.float32)
        for i in range(start, stop):
            integers[:, i] = np.clip(np.rint(left[i] / np.where(scale == 0, 1, scale)), -8, 7)
            lost[i - start] = (left[i] - integers[:, i] * scale) / factor[i, i]
            left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * lost[i - start]
        left[stop:] -= factor[start:stop, stop:].T @ lost
    return packed(integers.reshape(outputs, -1, GROUP)), np.concatenate(scales, 1)


def _factor(moments: np.ndarray) -> np.ndarray:
    """Returns the upper triangle U for which the inverse of the damped moments is U^T U."""
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.trace(damped) / len(damped) or 1.0
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
