"""Two folders exchange their names, so that one of them is at a name at every moment."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_HERE = -100  # AT_FDCWD of Linux's fcntl.h
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


def exchange(new: Path, old: Path) -> None:
    """Gives two folders beside each other each the other's name.

    Linux and macOS do it in one step. Elsewhere, and on file systems that cannot, it takes three renames, after the first of which
    nothing has the name `old`; `settle` puts right what a kill between them left.
    """
    if _exchange_at_once(new, old):
        return
    old.rename(set_aside(old))
    new.rename(old)
    set_aside(old).rename(new)


def set_aside(old: Path) -> Path:
    """Returns the name that `exchange` gives a folder between its renames."""
    return old.with_name(f"{old.name}.replaced")


def settle(new: Path, old: Path) -> None:
    """Ends an `exchange` that was killed: undoes it where the new folder has not got its name yet, else completes it."""
    aside = set_aside(old)
    if aside.is_dir() and not old.exists():
        aside.rename(old)
    elif aside.is_dir() and not new.exists():
        aside.rename(new)


def _exchange_at_once(new: Path, old: Path) -> bool:
    if sys.platform == "win32":
        return False
    a, b, libc = os.fsencode(new), os.fsencode(old), ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, a, _HERE, b, _SWAP)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, _SWAP)
    else:
        return False
    if failed and ctypes.get_errno() not in _UNABLE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(new), None, str(old))
    return not failed
