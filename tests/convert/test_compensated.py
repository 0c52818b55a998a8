"""Rounding to four bits that makes up for itself (GPTQ), beside a plain computation of the same."""

import numpy as np
import pytest

from flax_switch.config.presets import PRESETS
from flax_switch.config.weights import GROUP
from flax_switch.convert import compensated as rounding
from flax_switch.convert.compensated import compensated
from flax_switch.convert.quantize import quantized
from flax_switch.convert.tensors import CheckpointError, from_array

INT4 = PRESETS["switch-tiny"].replace(weights="int4", d_model=128, d_ff=128)
PATH = "encoder/layers_0/mlp/wi/kernel"


def plain(kernel):
    """Values and scales as they are without calibration."""
    path = PATH if kernel.ndim == 2 else "encoder/layers_1/mlp/expert/wi/kernel"
    tensors = quantized(INT4, {path: from_array(kernel)})
    return tensors[path].numpy(), tensors[path + "_scale"].numpy()


def numbers(values, scale):
    """The kernel [..., D, F] that they mean."""
    integers = np.concatenate([values & 15, values >> 4], axis=-1).astype(np.float64) - 8
    weights = integers * np.float64(scale)
    return weights.reshape(*weights.shape[:-2], -1).swapaxes(-1, -2)


def correlated(rng, rows, width):
    """Rows most of whose variance lies in few directions, as a model's do."""
    return rng.normal(size=(rows, width // 8)) @ rng.normal(size=(width // 8, width)) + 0.3 * rng.normal(size=(rows, width))


def surgeon(kernel, moments):
    """Optimal brain surgeon (2210.17323, equation 2), an input at a time, each with the inverse of what is left."""
    left = np.float64(kernel)
    damped = np.float64(moments) + rounding.DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    made = np.empty_like(left)
    for i in range(len(left)):
        if i % GROUP == 0:
            block = left[i : i + GROUP]
            largest = np.take_along_axis(block, np.abs(block).argmax(0)[None], 0)[0]
            scale = (np.float32(largest) / np.float32(-8)).astype(rounding.DTYPES["bfloat16"]).astype(np.float64)
        made[i] = np.clip(np.rint(left[i] / scale), -8, 7) * scale
        inverse = np.linalg.inv(damped[i:, i:])
        left[i:] -= np.outer(inverse[:, 0], (left[i] - made[i]) / inverse[0, 0])
    return made


def test_it_is_the_surgeons_rounding_of_one_input_after_the_other():
    rng = np.random.default_rng(0)
    kernel, rows = rng.normal(size=(128, 12)).astype(np.float32), correlated(rng, 300, 128)
    moments = (rows.T @ rows).astype(np.float32)
    found, want = numbers(*compensated(PATH, kernel, moments)), surgeon(kernel, moments)
    assert np.mean(np.abs(found - want) < 1e-4) > 0.99  # one that lies between two integers may fall to either side
    assert np.mean(np.abs(found - numbers(*plain(kernel))) > 1e-4) > 0.2  # and it is not what plain rounding gives


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_plainly():
    kernel = np.random.default_rng(1).normal(size=(128, 12)).astype(np.float32)
    for moments in (np.eye(128, dtype=np.float32) * 3, np.zeros((128, 128), np.float32)):  # none came by: nothing is known
        for found, want in zip(compensated(PATH, kernel, moments), plain(kernel), strict=True):
            assert found.dtype == want.dtype
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("seed", range(3))
def test_products_with_the_rows_lose_a_fraction_of_what_plain_rounding_loses(seed):
    rng = np.random.default_rng(seed)
    kernel, rows = rng.normal(size=(256, 64)).astype(np.float32), correlated(rng, 600, 256)
    found = numbers(*compensated(PATH, kernel, (rows[:300].T @ rows[:300]).astype(np.float32)))
    lost = [np.square(rows[300:] @ (made - kernel)).sum() for made in (found, numbers(*plain(kernel)))]  # on other rows
    assert lost[0] < 0.5 * lost[1]


def test_an_expert_that_no_row_hit_is_rounded_for_the_rows_of_the_others():
    rng = np.random.default_rng(3)
    kernels = np.broadcast_to(rng.normal(size=(128, 16)).astype(np.float32), (4, 128, 16))
    rows = correlated(rng, 500, 128)
    moments = np.stack([rows[part].T @ rows[part] for part in (slice(0, 250), slice(250, 500), slice(0), slice(0))])
    values, scales = compensated(PATH, kernels, moments.astype(np.float32))
    assert values.shape == (4, 16, 2, 32) and scales.shape == (4, 16, 2, 1)
    found, flat = numbers(values, scales), numbers(*plain(np.ascontiguousarray(kernels)))
    lost = [np.square(rows @ (made - kernels[0])).sum((1, 2)) for made in (found, flat)]
    np.testing.assert_array_equal(values[2], values[3])
    assert (lost[0] < 0.6 * lost[1]).all()


def test_what_is_not_finite_is_named():
    kernel = np.ones((64, 4), np.float32)
    kernel[5, 2] = np.nan
    with pytest.raises(CheckpointError, match=f"{PATH} holds a number that is not finite"):
        compensated(PATH, kernel, np.eye(64, dtype=np.float32))
    with pytest.raises(CheckpointError, match=f"What comes by at {PATH} is not finite"):
        compensated(PATH, np.ones((64, 4), np.float32), np.full((64, 64), np.inf, np.float32))
