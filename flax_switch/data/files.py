"""Files that are either complete or absent, and the folder caches live in."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flax_switch.config import ConfigError

_ABANDONED = 3600.0  # seconds after which an untouched temporary folder belongs to no living writer


def cache_folder(configured: str | None) -> Path:
    """The folder for caches: the configured one, else `flax_switch` in the user's cache directory."""
    if configured is not None:
        return Path(configured).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flax_switch"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an error, and is removed otherwise.

    The rename is atomic, so `path` is never seen half-written; where another process finished first, its folder stays.
    Raises `ConfigError` for a full disk or a folder that cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES) or not path.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is complete or absent. Raises `ConfigError` for a full disk or an unwritable folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent. Raises `ConfigError` for a full disk or an unwritable folder."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"No space left to write {path}. Free some, or set data.cache_dir to a folder on a larger disk; nothing "
                "half-written was kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise ConfigError(f"Cannot write {path}: {error.strerror}. Set data.cache_dir to a folder you may write.") from error
        raise


def _flush(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _remove_abandoned(path: Path) -> None:
    """Removes what a killed writer of `path` left behind."""
    for left in path.parent.glob(f"{path.name}.tmp-*"):
        newest = max((f.stat().st_mtime for f in (left, *left.glob("*")) if f.exists()), default=0.0)
        if time.time() - newest > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
