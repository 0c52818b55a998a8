"""Checks the grouped GEMMs of this platform, each expert's products by itself, and tells which of them runs, and why."""

import importlib.util

import jax

from flax_switch.ops.kernels import grouped, grouped_choice, platforms
from flax_switch.ops.kernels.exact_products import KernelCheck, check_products

_WIDTHS, _EXPERTS, _ROWS = (768, 3072), 8, 4096  # of switch-base-8: the shapes that a choice is told for


def check_grouped() -> list[KernelCheck]:
    """Runs every implementation that this platform has, in float32 and bfloat16, and on a GPU tokamax, too, where it is installed."""
    names = ["blocks", *({"tpu": ["ragged_dot"], "gpu": _of_gpu()}.get(jax.default_backend(), []))]
    return [
        check
        for name in names
        for dtype in (("bfloat16", "float16") if name in grouped_choice.MOSAIC else ("float32", "bfloat16"))
        for check in check_products(name, grouped.IMPLEMENTATIONS[name], dtype)
    ]


def _of_gpu() -> list[str]:
    gpu = platforms.gpu()
    mosaic = [] if gpu is None else [name for name in (grouped_choice.kernel_for(gpu),) if name]
    others = [name for name, here in (("triton", grouped_choice.WITH_TRITON), ("tokamax", _installed("tokamax"))) if here]
    return [*mosaic, *others]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def chosen() -> dict[str, grouped_choice.Pick]:
    """Returns which grouped GEMM runs here, and why, for rows and kernels of a dtype and of the widths of switch-base-8."""
    backend = jax.default_backend()
    if backend == "gpu" and "cuda" in platforms.POSSIBLE:
        gpu = platforms.gpu()
        return {d: grouped_choice.pick(gpu, _ROWS, _EXPERTS, _WIDTHS, (d, d)) for d in ("bfloat16", "float32")}
    why = {"tpu": "XLA compiles it to a grouped GEMM there, and megablox adds up kernels' gradients"}.get(backend, "plain loops")
    name = {"tpu": "ragged_dot"}.get(backend, "blocks")
    return {dtype: grouped_choice.Pick(name, why) for dtype in ("bfloat16", "float32")}
