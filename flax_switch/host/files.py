"""Files that are either complete or absent, and the folder caches live in."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from flax_switch.config import ConfigError

_TEMPORARY = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")  # what `_temporary` makes
_ABANDONED = 3600.0  # seconds after which an untouched temporary folder belongs to no living writer


def in_store(path: epath.PathLike) -> bool:
    """Returns whether a path lies in object storage (gs://..., s3://...): files there are not appended, renamed or mapped."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the path from the root; one in object storage always is (and pathlib's rules would break its name)."""
    return epath.Path(path) if in_store(path) else epath.Path(expanded(path)).resolve()


def expanded(path: epath.PathLike) -> Path:
    """Returns a local path with the home folder in place of a `~`; of a user who is not known here it stays as it is."""
    return Path(os.path.expanduser(path))


def cache_folder(configured: str | None) -> Path:
    """Returns the folder for caches: the configured one, else `flax_switch` in the user's cache directory.

    Raises `ConfigError` for one in object storage, and where there is no home folder.
    """
    if configured is not None:
        if in_store(configured):
            raise ConfigError(
                f"data.cache_dir ({configured}) must be a folder on this machine: what is in it is mapped into memory."
            )
        return expanded(configured)
    if sys.platform == "darwin":
        base = expanded("~/Library/Caches")
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", expanded("~/AppData/Local")))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache"))
    if base.parts[0] == "~":
        raise ConfigError("This user has no home folder, where caches would be: set data.cache_dir, or HOME in the environment.")
    return base / "flax_switch"


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file, computed once as long as its size and its times of change stay."""
    status = path.stat()
    return _checksum(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _checksum(path: Path, *_: int) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an error, and is removed otherwise.

    The rename is atomic, so `path` is never seen half-written; where another process finished first, its folder stays.
    Raises `ConfigError` for a full disk or a folder that cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = _temporary(path)
        temporary.mkdir()
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


def read_bytes(path: epath.PathLike, largest: int = 1 << 29, what: str = "what it should be") -> bytes:
    """Returns the contents of a file that is read as a whole.

    Raises `ConfigError` for one that cannot be read, is no regular file (but a pipe, or a link to a device), or is too large.
    """
    path = epath.Path(path)
    try:
        if not in_store(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is no regular file.")
            if status.st_size > largest:
                raise ConfigError(f"{path} has {status.st_size:,} bytes, too many for {what}.")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error


def check_writable(path: epath.PathLike, *, reads: Iterable[epath.PathLike] = (), make_folders: bool = False) -> None:
    """Raises `ConfigError`, before any work, for a file that could not be written at its end.

    reads: what the work reads, of which the file must be none. make_folders: folders above it are made where they are missing.
    """
    if in_store(path):
        return
    path = expanded(path)
    folder = path.absolute().parent
    while make_folders and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with _explained(path):
        same = path.exists() and any(os.path.exists(read) and os.path.samefile(path, read) for read in reads)
        for problem, why in (
            (path.is_dir(), "it is a folder"),
            (path.exists() and not path.is_file(), "it is no regular file"),
            (same, "it is the input; name another file"),
            (not folder.exists(), f"there is no folder {folder}"),
            (not folder.is_dir(), f"{folder} is no folder"),
            (not os.access(folder, os.W_OK), f"nothing may be written in {folder}"),
        ):
            if problem:
                raise ConfigError(f"Cannot write {path}: {why}.")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file that is complete or absent; see `write_bytes`."""
    write_bytes(path, text.encode(errors="replace"))  # paths in a text need not be UTF-8


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that is complete or absent, on a disk or an object store (gs://...).

    Raises `ConfigError` for a full disk or a folder that cannot be written.
    """
    path = epath.Path(path)
    with _explained(path):
        if in_store(path):  # stores write an object as a whole
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path.parent, f".{path.name}.tmp-", _ABANDONED)
        temporary = _temporary(path)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def remove_temporaries(folder: epath.Path, beginning: str = ".", age: float = 0.0) -> None:
    """Removes the files that killed writers of `write_bytes` left in a folder, of that beginning and at least of that age.

    The age, in seconds, is for folders in which others may be writing now.
    """
    if in_store(folder) or not folder.is_dir():
        return
    for path in Path(folder).iterdir():
        if path.name.startswith(beginning) and _TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink()


def _temporary(path: Path | epath.Path) -> Any:
    """Returns a name beside `path` that no other writer has; made by hand, as tempfile's files are their owner's alone to read."""
    return path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _explained(path: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"No space left to write {path}. Free some, or choose a folder on a larger disk (data.cache_dir, or the "
                "workdir); nothing half-written was kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise ConfigError(
                f"Cannot write {path}: {error.strerror}. Set data.cache_dir (or the workdir) to a folder you may write."
            ) from error
        raise


def _flush(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _remove_abandoned(path: Path) -> None:
    """Removes what a killed writer of `path` left behind."""
    patterns = (f".{path.name}.tmp-*", f"{path.name}.tmp-*")  # the latter of 0.1.0
    for left in (found for pattern in patterns for found in path.parent.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # its writer may be finishing right now
            newest = max(f.stat().st_mtime for f in (left, *left.glob("*")))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
