"""Products of many rows with many experts' kernels: equal buffers for each expert, or sorted rows in groups of any size.

The one place that knows which backend runs which kernel:

    equal buffers   a batched product
    sorted rows     TPU: `lax.ragged_dot`, which XLA compiles to a grouped kernel there; for the kernels' gradients, where it does
                    not, the Pallas kernel that comes with JAX. NVIDIA GPU: our Pallas kernels, in `grouped_triton`. Elsewhere:
                    loops over blocks of rows, in `grouped_blocks`. XLA's `lax.ragged_dot` computes every expert for every row on
                    CPU and on GPUs

What was counted and what was measured, and on which hardware, is in docs/moe.md.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flax_switch.host.compilers import can_compile_for
from flax_switch.ops.kernels.grouped_blocks import block_kernels, block_rows

# Branches for other devices need not be traced.
POSSIBLE = tuple(platform for platform in ("tpu", "cuda") if can_compile_for(platform))


@jax.custom_vjp
def batched_matmul(x: Float[Array, "G E C D"], kernel: Float[Array, "E D F"]) -> Float[Array, "G E C F"]:
    """Each expert's product with the rows of its buffer."""
    return _by_expert(x, kernel, transpose=False)


def _by_expert(x: Float[Array, "G E C D"], kernel: Array, *, transpose: bool) -> Float[Array, "G E C F"]:
    """x times each expert's kernel, or the kernel's transpose."""
    rows = _together(x)
    if transpose:  # the kernel as the left factor is read where it lies; as the right one a CPU transposes it first
        product = jnp.einsum("EFD,ERD->EFR", kernel, rows).swapaxes(1, 2)
    else:
        product = jnp.einsum("ERD,EDF->ERF", rows, kernel)
    return product.reshape(x.shape[1], x.shape[0], -1, product.shape[2]).swapaxes(0, 1)


def _together(x: Float[Array, "G E C D"]) -> Float[Array, "E R D"]:
    """All rows of an expert, whatever their group: with two axes of rows XLA transposes the whole product on a CPU."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])


def _batched_forward(x, kernel):
    return batched_matmul(x, kernel), (x, kernel)


def _batched_backward(residuals, gradient):
    x, kernel = residuals
    return _by_expert(gradient, kernel, transpose=True), jnp.einsum("ERD,ERF->EDF", _together(x), _together(gradient))


batched_matmul.defvjp(_batched_forward, _batched_backward)


@jax.custom_vjp
def grouped_matmul(x: Float[Array, "R D"], kernel: Float[Array, "E D F"], group_sizes: Int[Array, " E"]) -> Float[Array, "R F"]:
    """Row r times the kernel of the expert in whose group it is; rows beyond the sum of the groups come out zero.

    group_sizes: the first group_sizes[0] rows are expert 0's, and so on.
    """
    return _grouped_rows(x, kernel, group_sizes, transpose=False)


def _grouped_forward(x, kernel, group_sizes):
    return grouped_matmul(x, kernel, group_sizes), (x, kernel, group_sizes)


def _grouped_backward(residuals, gradient):
    x, kernel, group_sizes = residuals
    return (
        _grouped_rows(gradient, kernel, group_sizes, transpose=True),
        _by_platform(x, gradient, group_sizes, tpu=_tpu_kernels, cuda=_gpu("grouped_kernels"), elsewhere=block_kernels),
        None,
    )


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _grouped_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Rows times their experts' kernels, or the kernels' transposes."""
    tpu, cuda, elsewhere = (
        functools.partial(product, transpose=transpose) for product in (_ragged_rows, _gpu("grouped_rows"), block_rows)
    )
    return _by_platform(x, kernel, group_sizes, tpu=tpu, cuda=cuda, elsewhere=elsewhere)


def _by_platform(*args: Array, elsewhere: Callable[..., Array], **on_platform: Callable[..., Array]) -> Array:
    """Calls the function for the platform that the program is compiled for."""
    possible = {platform: function for platform, function in on_platform.items() if platform in POSSIBLE}
    return lax.platform_dependent(*args, **possible, default=elsewhere) if possible else elsewhere(*args)


def _gpu(name: str) -> Callable[..., Array]:
    """A function of the module with the kernels for GPUs, which is imported, and Pallas with it, where one is to be traced."""
    return lambda *args, **options: getattr(importlib.import_module("flax_switch.ops.kernels.grouped_triton"), name)(
        *args, **options
    )


def _ragged_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Sorted rows times kernels by XLA's own grouped product."""
    contract = lax.RaggedDotDimensionNumbers(
        (((1,), (2 if transpose else 1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(x, kernel, group_sizes, contract)


def _tpu_kernels(x: Array, gradient: Array, group_sizes: Array, *, interpret: bool = False) -> Array:
    """Each group's `x^T gradient` by a Pallas kernel for TPUs (`lax.ragged_dot_general` costs E times the FLOPs here)."""
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    tile = 512 if x.shape[0] > 128 * group_sizes.shape[0] else 128
    missing = -x.shape[0] % tile  # the kernel wants whole tiles of rows; those added are in no group
    x, gradient = (jnp.pad(a, [(0, missing), (0, 0)]) for a in (x, gradient))
    tiles = (tile, min(512, x.shape[1]), min(512, gradient.shape[1]))
    return megablox.tgmm(x.T, gradient, group_sizes, x.dtype, tiles, interpret=interpret)
