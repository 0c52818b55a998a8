"""Keeping a conversion's memory at what it holds."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3  # glibc's mallopt parameter
_RETURNED = 2**20  # bytes from which a freed buffer goes back to the system
_USUAL = 32 * 2**20  # what glibc's own rule settles at once large buffers were freed


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
