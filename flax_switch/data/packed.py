"""Files as bytes and as lines, whether they are plain or compressed with gzip or Zstandard; on disks and in object storage."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flax_switch.config import ConfigError, one_line
from flax_switch.data.remote import PatientFile
from flax_switch.host.files import in_store

COMPRESSIONS = {".gz": "gzip", ".zst": "Zstandard"}  # ending -> its name, for messages


def ending_of(path: Path) -> str:
    """Returns the ending that says how a file is compressed, or "" for one that is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever another library raises over a damaged file into one sentence: `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise plain exceptions of several kinds
        raise ConfigError(f"Cannot read {what}: {one_line(error)}.") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Yields the bytes of a file, unpacked while they are read.

    Raises `ConfigError` for a file that is damaged, cannot be read, or needs an extra that is not installed.
    """
    ending = ending_of(path)
    unpack, damage = _unpacker(path, ending)
    try:
        with _plain(path) as file, unpack(file) as unpacked:
            yield unpacked
    except damage as error:
        raise ConfigError(f"{path} is damaged or is no {COMPRESSIONS[ending]} file: {one_line(error)}.") from error
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error


def _plain(path: Path) -> IO[bytes]:
    return io.BufferedReader(PatientFile(path), 1 << 20) if in_store(path) else path.open("rb")


def _unpacker(path: Path, ending: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Returns what opens a file over a file, and the errors that tell damage."""
    if ending == ".gz":
        return gzip.open, (EOFError, gzip.BadGzipFile, zlib.error)
    if ending == ".zst":
        zstd = _zstd(path)
        # Files packed with --long need windows larger than what is allowed by default.
        options = {zstd.DecompressionParameter.window_log_max: zstd.DecompressionParameter.window_log_max.bounds()[1]}
        return lambda file: zstd.open(file, options=options), (EOFError, zstd.ZstdError)
    return contextlib.nullcontext, ()


def _zstd(path: Path) -> Any:
    """Returns Python's own module where there is one (3.14), else the package that brings it to older versions."""
    try:
        from compression import zstd  # type: ignore
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise ConfigError(f"Reading {path} needs backports.zstd: pip install 'flax_switch[zstd]'.") from error
    return zstd


def lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file without their ends. Raises `ConfigError` that says where it is not UTF-8."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8. Convert "
                    "the file to UTF-8, for instance with `iconv`."
                ) from error
            yield text.rstrip("\r\n")
