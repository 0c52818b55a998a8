"""Multiplies many rows by many experts' kernels: equal buffers for each expert, or sorted rows in groups of any size.

Equal buffers are one batched product. Sorted rows have implementations for each platform; among those for NVIDIA GPUs
`grouped_choice` picks.

    ragged_dot         TPU: `lax.ragged_dot`, which XLA compiles to a grouped GEMM there; for the kernels' gradients, where it does
                       not, the Pallas kernel that comes with JAX (megablox). XLA's `lax.ragged_dot` computes every expert for every
                       row on CPU and GPUs
    mosaic_hopper      NVIDIA Hopper: Pallas kernels that come with JAX, in `grouped_mosaic`
    mosaic_blackwell   NVIDIA Blackwell: the same, for products of rows
    triton             NVIDIA GPU: our Pallas kernels, in `grouped_triton`; on a JAX whose Triton back end is not deprecated
    blocks             any platform: loops over blocks of rows, in `grouped_blocks`
    tokamax            the package's own choice; where it is asked for and installed
    reference          plain jnp: every expert for every row

What was counted and what was measured, and on which hardware, is in docs/moe.md.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flax_switch.config import ConfigError
from flax_switch.ops.kernels import Size, grouped_choice, platforms
from flax_switch.ops.kernels.adapted import Adapted
from flax_switch.ops.kernels.grouped_blocks import block_gradients, block_rows
from flax_switch.ops.kernels.grouped_mosaic import within_groups
from flax_switch.ops.kernels.narrow import Narrow
from flax_switch.ops.kernels.quantized import Quantized, dequantized, multiply_quantized


def batched_matmul(
    x: Float[Array, "G E C D"], kernel: Float[Array, "E D F"] | Quantized | Narrow | Adapted
) -> Float[Array, "G E C F"]:
    """Multiplies the rows of each expert's buffer by its kernel."""
    if isinstance(kernel, Adapted):
        return kernel.multiplied(x, batched_matmul)
    if isinstance(kernel, Narrow):
        return kernel.multiplied(x, lambda x, values: _batched_matmul(x, values.astype(x.dtype)))
    if not isinstance(kernel, Quantized):
        return _batched_matmul(x, kernel)
    return _buffers(multiply_quantized(_rows_by_expert(x), kernel), x)


@jax.custom_vjp
def _batched_matmul(x: Float[Array, "G E C D"], kernel: Float[Array, "E D F"]) -> Float[Array, "G E C F"]:
    return _by_expert(x, kernel, transpose=False)


def _by_expert(x: Float[Array, "G E C D"], kernel: Array, *, transpose: bool) -> Float[Array, "G E C F"]:
    """Multiplies x by each expert's kernel, or by the kernel's transpose."""
    rows = _rows_by_expert(x)
    if transpose:  # the kernel as the left factor is read where it lies; as the right one a CPU transposes it first
        product = jnp.einsum("EFD,ERD->EFR", kernel, rows).swapaxes(1, 2)
    else:
        product = jnp.einsum("ERD,EDF->ERF", rows, kernel)
    return _buffers(product, x)


def _rows_by_expert(x: Float[Array, "G E C D"]) -> Float[Array, "E R D"]:
    """Joins the rows of an expert from all groups: with two axes of rows XLA transposes the whole product on a CPU."""
    G, E, C, D = x.shape
    return x.swapaxes(0, 1).reshape(E, G * C, D)


def _buffers(rows: Float[Array, "E R F"], x: Float[Array, "G E C D"]) -> Float[Array, "G E C F"]:
    """Returns the inverse of `_rows_by_expert`, for what was made of the rows of x."""
    G, E, C, _ = x.shape  # not -1, which has no value for a batch without rows
    return rows.reshape(E, G, C, rows.shape[2]).swapaxes(0, 1)


def _batched_forward(x, kernel):
    return _batched_matmul(x, kernel), (x, kernel)


def _batched_backward(residuals, gradient):
    x, kernel = residuals
    return _by_expert(gradient, kernel, transpose=True), jnp.einsum("ERD,ERF->EDF", _rows_by_expert(x), _rows_by_expert(gradient))


_batched_matmul.defvjp(_batched_forward, _batched_backward)


def grouped_matmul(
    x: Float[Array, "R D"],
    kernel: Float[Array, "E D F"] | Quantized | Narrow | Adapted,
    group_sizes: Int[Array, " E"],
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """Multiplies row r by the kernel of the expert in whose group it is; rows beyond the sum of the groups come out zero.

    group_sizes: the first group_sizes[0] rows are expert 0's, and so on. implementation: one of IMPLEMENTATIONS; by default the
    one that `defaults` names for the platform. A quantised kernel is given to "blocks" as it is, and to the others as floats; so is
    one of 16 bits that is widened late, which has no gradient.
    """
    if isinstance(kernel, Adapted):
        return kernel.multiplied(x, lambda x, kernel: grouped_matmul(x, kernel, group_sizes, implementation))
    if isinstance(kernel, Quantized):
        return _quantized_rows(x, kernel, group_sizes, implementation)
    if isinstance(kernel, Narrow):
        return _rows_of_other_forms(x, kernel, group_sizes, implementation, lambda kernel: kernel.values.astype(x.dtype))
    return _grouped_matmul(x, kernel, group_sizes, implementation)


def defaults(num_rows: Size, dtype: jnp.dtype, kernel: Float[Array, "E D F"] | Quantized | Narrow) -> dict[str, str]:
    """Returns which implementation runs on which platform, for rows of a dtype and kernels: the same for all three products."""
    named = {"tpu": "ragged_dot", "other": "blocks"}
    if "cuda" in platforms.POSSIBLE:
        E, D, F = kernel.shape
        dtypes = (dtype, dtype if isinstance(kernel, (Quantized, Narrow)) else kernel.dtype)
        picked = grouped_choice.pick(platforms.gpu(), num_rows, E, (D, F), dtypes)
        if picked.implementation != named["other"]:
            named["cuda"] = picked.implementation
    return named


def chosen(x: Float[Array, "R D"], kernel: Float[Array, "E D F"] | Quantized | Narrow) -> str:
    """Returns which implementation runs on this process's platform, for these factors."""
    named, backend = defaults(x.shape[0], x.dtype, kernel), jax.default_backend()
    return named.get("cuda" if backend == "gpu" else backend, named["other"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Array, kernel: Array, group_sizes: Array, implementation: str | None) -> Array:
    return _grouped_rows(x, kernel, group_sizes, implementation, defaults(x.shape[0], x.dtype, kernel), transpose=False)


def _grouped_forward(x, kernel, group_sizes, implementation):
    return _grouped_matmul(x, kernel, group_sizes, implementation), (x, kernel, group_sizes)


def _grouped_backward(implementation, residuals, gradient):
    x, kernel, group_sizes = residuals
    default = defaults(x.shape[0], x.dtype, kernel)
    gradients = {name: pair[1] for name, pair in IMPLEMENTATIONS.items()}
    return (
        _grouped_rows(gradient, kernel, group_sizes, implementation, default, transpose=True),
        platforms.run(gradients, default, implementation, x, gradient, group_sizes),
        None,
    )


_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _grouped_rows(
    x: Array, kernel: Array, group_sizes: Array, implementation: str | None, default: Mapping[str, str], *, transpose: bool
) -> Array:
    """Multiplies rows by their experts' kernels, or by the kernels' transposes."""
    products = {name: functools.partial(pair[0], transpose=transpose) for name, pair in IMPLEMENTATIONS.items()}
    return platforms.run(products, default, implementation, x, kernel, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantized_rows(x: Array, kernel: Quantized, group_sizes: Array, implementation: str | None) -> Array:
    """Multiplies rows by their experts' quantised kernels."""
    return _rows_of_other_forms(x, kernel, group_sizes, implementation, lambda kernel: dequantized(kernel, x.dtype))


def _rows_of_other_forms(
    x: Array, kernel: Quantized | Narrow, group_sizes: Array, implementation: str | None, as_floats: Callable[..., Array]
) -> Array:
    """Multiplies rows by kernels that "blocks" takes as they are, and the others as floats."""

    def of_floats(name: str) -> Callable[..., Array]:
        rows = functools.partial(IMPLEMENTATIONS[name][0], transpose=False)
        return rows if name == "blocks" else lambda x, kernel, sizes: rows(x, as_floats(kernel), sizes)

    every = {name: of_floats(name) for name in IMPLEMENTATIONS}
    return platforms.run(every, defaults(x.shape[0], x.dtype, kernel), implementation, x, kernel, group_sizes)


def _quantized_forward(x, kernel, group_sizes, implementation):
    return _quantized_rows(x, kernel, group_sizes, implementation), (kernel, group_sizes)


def _quantized_backward(implementation, residuals, gradient):
    kernel, group_sizes = residuals
    weights = dequantized(kernel, gradient.dtype)
    default = defaults(gradient.shape[0], gradient.dtype, weights)
    return _grouped_rows(gradient, weights, group_sizes, implementation, default, transpose=True), None, None


_quantized_rows.defvjp(_quantized_forward, _quantized_backward)


def _triton(name: str) -> Callable[..., Array]:
    """Returns a function of `grouped_triton`, which imports that module, and Pallas with it, only when it is called."""
    return lambda *args, **options: getattr(importlib.import_module("flax_switch.ops.kernels.grouped_triton"), name)(
        *args, **options
    )


def _members(group_sizes: Array, num_rows: int) -> Bool[Array, "E R"]:
    """Returns which rows each group has."""
    ends, rows = jnp.cumsum(group_sizes)[:, None], jnp.arange(num_rows)[None]
    return (rows >= ends - group_sizes[:, None]) & (rows < ends)


def _reference_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Multiplies every row by every kernel, and keeps its own expert's product."""
    every = jnp.einsum("RF,EDF->ERD" if transpose else "RD,EDF->ERF", x, kernel, preferred_element_type=jnp.float32)
    return jnp.where(_members(group_sizes, len(x))[..., None], every, 0).sum(0).astype(x.dtype)


def _reference_gradient(x: Array, gradient: Array, group_sizes: Array) -> Array:
    """Sums every group's `x^T gradient` over all rows, with zeros for those of other groups."""
    rows = jnp.where(_members(group_sizes, len(x))[..., None], x, 0)
    return jnp.einsum("ERD,RF->EDF", rows, gradient, preferred_element_type=jnp.float32).astype(x.dtype)


def _ragged_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Multiplies sorted rows by kernels with XLA's own grouped matrix product."""
    return lax.ragged_dot_general(x, kernel, group_sizes, _contraction(transpose))


def _contraction(transpose: bool) -> lax.RaggedDotDimensionNumbers:
    dimensions = (((1,), (2 if transpose else 1,)), ((), ()))
    return lax.RaggedDotDimensionNumbers(dimensions, lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])


def _megablox_gradient(x: Array, gradient: Array, group_sizes: Array, *, interpret: bool = False) -> Array:
    """Returns each group's `x^T gradient` from a Pallas kernel for TPUs (`lax.ragged_dot_general` costs E times the FLOPs here)."""
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    tile = 512 if x.shape[0] > 128 * group_sizes.shape[0] else 128
    missing = -x.shape[0] % tile  # the kernel wants whole tiles of rows; those added are in no group
    x, gradient = (jnp.pad(a, [(0, missing), (0, 0)]) for a in (x, gradient))
    tiles = (tile, min(512, x.shape[1]), min(512, gradient.shape[1]))
    return megablox.tgmm(x.T, gradient, group_sizes, x.dtype, tiles, interpret=interpret)


def _tokamax_rows(x: Array, kernel: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """Multiplies sorted rows by kernels as tokamax has it."""
    return within_groups(_tokamax().ragged_dot_general(x, kernel, group_sizes, _contraction(transpose)), group_sizes)


def _tokamax_gradient(x: Array, gradient: Array, group_sizes: Array) -> Array:
    contract = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return _tokamax().ragged_dot_general(x, gradient, group_sizes, contract)


def _tokamax() -> Any:
    if importlib.util.find_spec("tokamax") is None:
        raise ConfigError(
            "The implementation 'tokamax' needs the package of that name, which is not installed: "
            "pip install 'flax_switch[tokamax]' (Python 3.12 or newer), or leave the implementation to its default."
        )
    return importlib.import_module("tokamax")


# The product of rows, and the gradient of the kernels.
IMPLEMENTATIONS = {
    "reference": (_reference_rows, _reference_gradient),
    "blocks": (block_rows, block_gradients),
    "ragged_dot": (_ragged_rows, _megablox_gradient),
    **grouped_choice.MOSAIC,
    **({"triton": (_triton("grouped_rows"), _triton("grouped_gradients"))} if grouped_choice.WITH_TRITON else {}),
    "tokamax": (_tokamax_rows, _tokamax_gradient),
}
