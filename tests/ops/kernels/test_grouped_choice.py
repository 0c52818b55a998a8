"""Which grouped GEMM an NVIDIA GPU gets, by generation, factors, and the JAX that is here; and that none is wrong unnoticed."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_oracle import assert_products, operands
from test_grouped_mosaic import BLACKWELL, HOPPER

from flax_switch.config import ConfigError
from flax_switch.ops.kernels import exact_products, grouped, grouped_choice, platforms
from flax_switch.ops.kernels.exact_products import check_products

AMPERE, VOLTA, CONSUMER = (
    HOPPER._replace(device_kind=k, capability=c) for k, c in (("A100", (8, 0)), ("V100", (7, 0)), ("5090", (12, 0)))
)
HERE = platforms.GpuHere(*HOPPER)
BF16 = ("bfloat16", "bfloat16")


@pytest.mark.parametrize("old", [True, False], ids=["before JAX 0.11", "newest JAX"])
@pytest.mark.parametrize(
    ("gpu", "rows", "groups", "widths", "dtypes", "name"),
    [
        (HOPPER, 4096, 8, (768, 3072), BF16, "mosaic_hopper"),
        (HOPPER, 4096, 256, (64, 192), ("float16", "float16"), "mosaic_hopper"),
        (HOPPER, 4096, 8, (768, 3072), ("float32", "float32"), None),  # tensor cores take no transposed float32
        (HOPPER, 4096, 8, (768, 3072), ("bfloat16", "float32"), None),
        (HOPPER, 4096, 8, (96, 3072), BF16, None),
        (HOPPER, 4096, 257, (768, 3072), BF16, None),
        (HOPPER, 0, 8, (768, 3072), BF16, None),
        (BLACKWELL, 4096, 8, (768, 3072), BF16, "mosaic_blackwell"),
        (BLACKWELL, 4096, 8, (64, 3072), BF16, None),
        (CONSUMER, 4096, 8, (768, 3072), BF16, None),
        (AMPERE, 4096, 8, (768, 3072), BF16, None),
        (VOLTA, 4096, 8, (768, 3072), BF16, "blocks"),
        (None, 4096, 8, (768, 3072), BF16, None),
    ],
)  # fmt: skip
def test_the_choice_is_a_table_of_the_gpu_the_factors_and_the_jax(gpu, rows, groups, widths, dtypes, name, old, monkeypatch):
    """None: Triton where it is not deprecated, and else the loops."""
    monkeypatch.setattr(grouped_choice, "WITH_TRITON", old)
    picked = grouped_choice.pick(gpu, rows, groups, widths, dtypes)
    assert picked.implementation == (name or ("triton" if old else "blocks"))
    assert picked.why and ("deprecated" in picked.why) == (picked.implementation == "blocks" and not old)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Has the choice believe that an H100 is here, beside its compiler; what runs is the CPU's branch of a program."""
    monkeypatch.setattr(platforms, "POSSIBLE", ("cpu", "cuda"))
    monkeypatch.setattr(platforms, "_gpu_here", lambda: HERE)
    grouped_choice._wrong.cache_clear()
    yield
    grouped_choice._wrong.cache_clear()


def test_a_kernel_that_is_wrong_for_one_expert_is_not_picked_and_one_warning_says_so(on_a_gpu, monkeypatch, caplog):
    def wrong(x, gradient, group_sizes):
        return grouped._reference_gradient(x, gradient, group_sizes).at[5].set(jnp.nan)  # the group without rows

    monkeypatch.setitem(grouped_choice.MOSAIC, "mosaic_hopper", (grouped._reference_rows, wrong))
    x, kernel, cotangent = operands([3, 0, 4], 64, 64, jnp.bfloat16)
    sizes = jnp.asarray([3, 0, 4], jnp.int32)

    @jax.jit
    def with_gradients(x, kernel, cotangent):
        product, transpose = jax.vjp(lambda *factors: grouped.grouped_matmul(*factors, sizes), x, kernel)
        return product, transpose(cotangent)

    with caplog.at_level(logging.WARNING):
        product, gradients = with_gradients(x, kernel, cotangent)
    assert_products([3, 0, 4], x, kernel, cotangent, product, *gradients)
    (record,) = caplog.records
    assert "mosaic_hopper failed its check here (bfloat16, gradient of kernels: WRONG for expert 5)" in record.getMessage()


@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_is_checked_once_before_it_is_picked(right, on_a_gpu, monkeypatch):
    runs = []

    def rows(x, kernel, group_sizes, *, transpose):
        runs.append(transpose)
        if not right:
            raise ValueError("no such tile")
        return grouped._reference_rows(x, kernel, group_sizes, transpose=transpose)

    monkeypatch.setitem(grouped_choice.MOSAIC, "mosaic_hopper", (rows, grouped._reference_gradient))
    picks = [grouped_choice.pick(HERE, 4096, 8, (768, 3072), BF16) for _ in range(2)]
    assert runs == [False, True]
    assert picks[0] == picks[1] and (picks[0].implementation == "mosaic_hopper") == right
    if not right:
        assert "FAILED: ValueError: no such tile" in picks[0].why


def test_the_check_names_the_expert_and_the_rows_of_none():
    def scaled(x, kernel, group_sizes, *, transpose):
        return grouped._reference_rows(x, kernel.at[3].multiply(1.1), group_sizes, transpose=transpose)

    def everywhere(x, kernel, group_sizes, *, transpose):
        return grouped._reference_rows(x, kernel, group_sizes, transpose=transpose) + (jnp.arange(len(x)) == len(x) - 1)[:, None]

    for rows, expert in ((grouped._reference_rows, None), (scaled, 3), (everywhere, exact_products.NOBODY)):
        forward, inputs, kernels = check_products("mine", (rows, grouped._reference_gradient), "float32")
        assert kernels.fine and (forward.fine, inputs.fine) == (expert is None,) * 2
        if expert is not None:
            assert forward.expert == inputs.expert == expert
    assert forward.verdict == "WRONG for rows of no expert"


def test_a_gpu_is_known_by_what_its_maker_says_of_it(monkeypatch):
    class Device:
        device_kind, core_count = "NVIDIA H100", 132

    def here(capability):
        Device.compute_capability = capability
        platforms._gpu_here.cache_clear()
        return platforms.gpu()

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    try:
        assert here("9.0") == platforms.GpuHere("NVIDIA H100", (9, 0), 132)
        assert here("10.3").capability == (10, 3)
        assert here("gfx942") is None  # AMD's
        with platforms.compiled_for("tpu"):
            assert platforms.gpu() is None and platforms.target() == "tpu"
    finally:
        platforms._gpu_here.cache_clear()


def test_tokamax_that_is_not_installed_is_an_error_that_says_how():
    if grouped.importlib.util.find_spec("tokamax") is not None:
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=r"pip install 'flax_switch\[tokamax\]'"):
        grouped.grouped_matmul(jnp.ones((3, 8)), jnp.ones((1, 8, 8)), jnp.asarray([3]), implementation="tokamax")


def test_tokamax_says_what_the_contract_says():
    pytest.importorskip("tokamax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks = check_products("tokamax", grouped.IMPLEMENTATIONS["tokamax"], "float32")
    assert all(check.fine for check in checks), checks
    np.testing.assert_equal(len(checks), 3)
