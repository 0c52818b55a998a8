"""One writer at a time: a claim on a path that ends with the process that made it, however that ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_LOCKED_BYTE = 2**30  # Windows locks ranges against reading too: one far behind the text that says who holds the lock
_MAX_HOLDER = 500  # bytes of that text

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, what: str) -> Iterator[None]:
    """Claims a path for the time of the block, by a lock on the file `<path>.lock` beside it.

    The system lets go of the lock when its process ends, killed or not; a lock file that was left behind is taken over. Between
    machines it holds as far as their file system carries locks (NFS from version 4 on). Where there are no locks at all, the log
    says so and the block runs without one.

    Args:
      path: what is claimed, a folder that need not exist; links in it are followed, so that two names of one folder are one.
      what: the holder's work in a word or two, as in "conversion".

    Raises:
      ConfigError: where another process, or another thread, holds the path, saying who; or where no lock file can be written.
    """
    place = lock_file(path)
    file = _acquire(place, what)
    try:
        yield
    finally:
        _release(place, file)


def lock_file(path: str | os.PathLike[str]) -> Path:
    """Returns where the lock of a path lies: beside it, its links followed."""
    real = Path(os.path.realpath(path))
    return real.parent / f"{real.name}.lock"


def _acquire(place: Path, what: str) -> int:
    """Opens and locks the lock file; one that its former holder removed in between is opened anew."""
    while True:
        file = _open(place)
        try:
            if not _try_lock(file, place):
                raise ConfigError(_refusal(file, place, what))
            if _is_at(file, place):
                _sign(file, what)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(place: Path) -> int:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(place, _OPEN, 0o666)
    except OSError as error:
        raise ConfigError(
            f"Cannot write the lock file {place}: {error.strerror}. Choose a folder whose parent you may write to."
        ) from error
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise ConfigError(f"{place} is no regular file, so it cannot serve as the lock. Remove it.")


def _try_lock(file: int, place: Path) -> bool:
    """Locks without waiting; returns whether nobody else holds the lock."""
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("The file system of %s has no locks: see to it that nothing else writes there.", place)
    return True


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        _windows(file, "LK_NBLCK")


def _unlock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)  # also for children that inherited the file
    else:
        _windows(file, "LK_UNLCK")


def _windows(file: int, mode: str) -> None:
    if msvcrt is None:
        raise OSError(errno.ENOSYS, "this system has no locks")
    os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
    module: Any = msvcrt  # type checkers know it on Windows alone
    module.locking(file, getattr(module, mode), 1)


def _is_at(file: int, place: Path) -> bool:
    """Says whether the open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(place))
    return False


def _sign(file: int, what: str) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, f"{what}, pid {os.getpid()} on {socket.gethostname()} since {now}\n".encode())


def _refusal(file: int, place: Path, what: str) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    holder = os.read(file, _MAX_HOLDER).decode(errors="replace").strip() or "it has not said which yet"
    return (
        f"{place.with_suffix('')} is in use by another process ({holder}), so that this {what} cannot write there. "
        "Wait for that one to end, or choose another folder."
    )


def _release(place: Path, file: int) -> None:
    """Removes the lock file and unlocks it, in this order; Windows removes closed files only, and none that another has opened."""
    try:
        if sys.platform != "win32" and _is_at(file, place):
            _remove(place)
    finally:
        with contextlib.suppress(OSError):
            _unlock(file)
        os.close(file)
    if sys.platform == "win32":
        _remove(place)


def _remove(place: Path) -> None:
    with contextlib.suppress(OSError):
        place.unlink()
