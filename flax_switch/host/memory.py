"""Tells the host's allocator to keep what a training step frees, or to give back what a conversion frees.

On a CPU XLA allocates a step's temporaries and gradients anew in every step. The GNU C library gets large blocks from the
system and gives them back, and the system clears every page again: for a step that writes gigabytes of gradients that takes longer
than some of its products. Kept memory costs nothing the second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from flax_switch.host.compilers import PACKAGES, can_compile_for

# Parameters of mallopt(3) in glibc's malloc.h, and their values: one arena, no block straight from the system, nothing given back
# before the process ends, and the heap grown by 64 MiB at a time.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}

_M_MMAP_THRESHOLD = -3  # glibc's mallopt parameter
_RETURNED = 2**20  # bytes from which a freed buffer goes back to the system
_USUAL = 32 * 2**20  # what glibc's own rule settles at once large buffers were freed


def keep_freed_memory() -> bool:
    """Has malloc keep freed memory for the next step; call it before JAX runs anything, since its threads choose their arenas then.

    Returns whether it did. It does nothing where glibc is not the C library, where GLIBC_TUNABLES already sets malloc, and where
    JAX will run on an accelerator. The process's resident memory then stays at its highest point.
    """
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not on_cpu():
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(parameter, value) for parameter, value in _SETTINGS.values()]
    return all(done)


def on_cpu() -> bool:
    """Returns whether JAX will run on a CPU, as far as can be told without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(map(can_compile_for, PACKAGES))


def return_freed_memory() -> None:
    """Gives back to the system what is free now, and from now on large buffers when they are freed; where the C library is glibc.

    What compiling a program took is otherwise kept for as long as the process lives.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED)
        libc.malloc_trim(0)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Has freed buffers go back to the system at once, where the C library is glibc.

    Left to itself it keeps what every one of a decoder's threads freed: three times as much as the conversion of a T5X checkpoint
    holds. Afterwards, large buffers are kept again, which training on CPU profits from.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _RETURNED)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL)
