"""Checks the grouped GEMMs of this platform, each expert's products by itself, and tells which of them runs, and why."""

import importlib.util

import jax

from flax_switch.ops.kernels import grouped, grouped_choice, platforms
from flax_switch.ops.kernels.exact_products import KernelCheck, check_products

_WIDTHS, _EXPERTS, _ROWS = (768, 3072), 8, 4096  # of switch-base-8: the shapes that a choice is told for


def check_grouped() -> list[KernelCheck]:
    """Runs every implementation that this platform has, JAX's kernels for GPUs in 16 bits, the others in float32 and bfloat16."""
    return [
        check
        for name in implementations_here()
        for dtype in (("bfloat16", "float16") if name in grouped_choice.MOSAIC else ("float32", "bfloat16"))
        for check in check_products(name, grouped.IMPLEMENTATIONS[name], dtype)
    ]


def implementations_here() -> list[str]:
    """Returns the names of those that are for this process's platform; on a GPU tokamax is one, where it is installed."""
    backend = jax.default_backend()
    if backend != "gpu":
        return ["blocks", "ragged_dot"] if backend == "tpu" else ["blocks"]
    gpu = platforms.gpu()
    mosaic = None if gpu is None else grouped_choice.kernel_for(gpu)
    here = {"triton": grouped_choice.WITH_TRITON, "tokamax": _installed("tokamax")}
    return ["blocks", *([mosaic] if mosaic else []), *(name for name, there in here.items() if there)]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def chosen() -> dict[str, grouped_choice.Pick]:
    """Returns which grouped GEMM runs here, and why, for rows and kernels of a dtype and of the widths of switch-base-8."""
    backend = jax.default_backend()
    if backend == "gpu" and "cuda" in platforms.POSSIBLE:
        gpu = platforms.gpu()
        return {d: grouped_choice.pick(gpu, _ROWS, _EXPERTS, _WIDTHS, (d, d)) for d in ("bfloat16", "float32")}
    why = {"tpu": "XLA compiles it to a grouped GEMM there, and megablox adds up kernels' gradients"}.get(
        backend, "loops over blocks of rows, in plain XLA"
    )
    name = implementations_here()[-1]
    return {dtype: grouped_choice.Pick(name, why) for dtype in ("bfloat16", "float32")}
