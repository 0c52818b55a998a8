"""Picks the grouped GEMM for an NVIDIA GPU: by its generation, the factors, and the JAX that is here.

    mosaic_hopper      capability 9: 16-bit floats, widths that 64 divides, up to MOST_GROUPS experts
    mosaic_blackwell   capability 10: the same, widths that 128 divides
    triton             whatever is left on a JAX older than 0.11, from Ampere on; there float32 too
    blocks             all else, and any of the above whose products are not right on this GPU

`lax.ragged_dot` is never picked: XLA, 0.10.2 and 0.12.0.1, computes every expert for every row on NVIDIA GPUs. Nor is tokamax,
which runs where it is asked for by name. A kernel of JAX's is checked before it is first picked, expert by expert, on the GPU of
this process (`exact_products`); for a GPU that a plan describes nothing can be run.
"""

import functools
import importlib.util
import logging
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from flax_switch.ops.kernels import Size, grouped_blocks, grouped_mosaic, platforms
from flax_switch.ops.kernels.exact_products import Pair, check_products

log = logging.getLogger(__name__)

WITH_TRITON = jax.__version_info__ < (0, 11)  # Pallas's Triton back end is deprecated since then
MOST_GROUPS = 256  # JAX's kernels look for a tile's group among all of them, one after another, in unrolled code

MOSAIC: dict[str, Pair] = {
    "mosaic_hopper": (grouped_mosaic.hopper_rows, grouped_mosaic.hopper_gradients),
    "mosaic_blackwell": (grouped_mosaic.blackwell_rows, grouped_blocks.block_gradients),
}
_GENERATIONS = {9: ("mosaic_hopper", 64), 10: ("mosaic_blackwell", 128)}  # what divides the widths


class Pick(NamedTuple):
    """An implementation's name, and why it is this one."""

    implementation: str
    why: str


def pick(
    gpu: platforms.Gpu | None, num_rows: Size, num_groups: int, widths: tuple[int, int], dtypes: tuple[DTypeLike, DTypeLike]
) -> Pick:
    """Returns the implementation for a product of `num_rows` rows with kernels of these widths; the log tells once for each reason.

    gpu: None where nothing is known of it. dtypes: of rows and kernels.
    """
    if gpu is None:
        return _others("nothing is known of the GPU", (0, 0))
    name, divisor = _GENERATIONS.get(gpu.capability[0], (None, 1))
    major, minor = gpu.capability
    if name is None:
        return _told(gpu.device_kind, *_others(f"JAX has no kernel for capability {major}.{minor}", gpu.capability))
    short = [str(jax.numpy.dtype(dtype)) for dtype in dtypes]
    reasons = {
        f"{name} takes float16 or bfloat16, one for both factors": short[0] == short[1] and short[0] in ("float16", "bfloat16"),
        f"{name} takes widths that {divisor} divides": all(width % divisor == 0 for width in widths),
        f"{name} takes at most {MOST_GROUPS} experts": num_groups <= MOST_GROUPS,
        f"{name} takes a number of rows that is known": isinstance(num_rows, int) and num_rows > 0,
    }
    against = next((reason for reason, met in reasons.items() if not met), None) or wrong(name, short[0], gpu)
    if against is not None:
        return _told(gpu.device_kind, *_others(against, gpu.capability))
    return _told(gpu.device_kind, name, f"JAX's kernel for capability {major}.{minor}")


def kernel_for(gpu: platforms.Gpu) -> str | None:
    """Returns the name of JAX's kernel for this GPU's generation, None where there is none."""
    return _GENERATIONS.get(gpu.capability[0], (None, 1))[0]


def _others(why: str, capability: tuple[int, int]) -> Pick:
    if WITH_TRITON and (capability >= (8, 0) or capability == (0, 0)):
        return Pick("triton", why)
    triton = "Triton takes Ampere or newer" if WITH_TRITON else "Pallas's Triton back end is deprecated since JAX 0.11"
    return Pick("blocks", f"{why}, and {triton}")


def wrong(name: str, dtype: str, gpu: platforms.Gpu) -> str | None:
    """Returns what is wrong with an implementation on this GPU, None if nothing is; the log warns, once."""
    return _wrong(name, dtype, isinstance(gpu, platforms.GpuHere))


@functools.cache
def _wrong(name: str, dtype: str, here: bool) -> str | None:
    if importlib.util.find_spec("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu") is None:
        return f"this JAX, {jax.__version__}, comes without {name}"
    if not here:
        return None
    failed = next((check for check in check_products(name, MOSAIC[name], dtype) if not check.fine), None)
    if failed is None:
        return None
    why = f"{name} failed its check here ({dtype}, {failed.product}: {failed.verdict})"
    log.warning("The grouped GEMM is another one: %s. See flax-switch doctor.", why)
    return why


@functools.cache
def _told(device: str, implementation: str, why: str) -> Pick:
    log.info("Grouped GEMM on %s: %r (%s).", device, implementation, why)
    return Pick(implementation, why)
