"""Files on other machines: data sets of the Hugging Face hub (hf://datasets/OWNER/NAME[@REVISION]/PATH) and object storage.

They are listed and read through etils' paths, on fsspec. A network that fails for some seconds is waited for; what cannot be had is
a `ConfigError` of one sentence.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

from flax_switch.config import ConfigError, check, one_line

HUB = "hf://"
MIRROR = "FLAX_SWITCH_HUB_MIRROR"  # names a folder on a disk with the hub's layout, which is read in its place
PAUSES = (1.0, 3.0, 10.0, 30.0)  # seconds before something is tried again
_DATASET = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@[^/]+)?(/.*)?")
# What another try does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError, ImportError)
_Result = TypeVar("_Result")


def on_hub(pattern: str) -> bool:
    """Returns whether a name is one of the hub's."""
    return pattern.startswith(HUB)


def located(pattern: str, setting: str) -> str:
    """Returns the name under which to look for files: itself, or on the hub's mirror where there is one.

    Raises `ConfigError` for a name on the hub that names no data set.
    """
    if not on_hub(pattern):
        return pattern
    check(
        _DATASET.fullmatch(pattern),
        f"{setting}: {pattern!r} names no data set of the hub; write hf://datasets/OWNER/NAME/PATH, or with a revision "
        "hf://datasets/OWNER/NAME@REVISION/PATH.",
    )
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{pattern.removeprefix(HUB)}" if mirror else pattern


def stored_files(pattern: str) -> list[Any]:
    """Returns the files that a path, a folder (searched through) or a glob without ** names, as etils' paths.

    Raises `ConfigError` for what cannot be listed.
    """
    return patiently(pattern, lambda: list(_files(epath.Path(pattern))))


def _files(path: Any) -> Iterator[Any]:
    if not path.exists():
        yield from path.parent.glob(path.name)
    elif path.is_dir():
        for entry in path.iterdir():
            yield from _files(entry)
    else:
        yield path


class PatientFile(io.RawIOBase):
    """The bytes of a file, opened again where it was when reading fails."""

    def __init__(self, path: Any):
        self._path, self._place, self._file = path, 0, None

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, or of it what the file still has."""
        content = patiently(self._path, lambda: self._read(len(buffer)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def _read(self, count: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(self._place)
            return self._file.read(count)
        except Exception:
            self._file = None
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place}.get(whence)
        if start is None:
            start = patiently(self._path, self._path.stat).length
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """Returns the place."""
        return self._place

    def close(self) -> None:
        """Closes it."""
        if self._file is not None:
            self._file.close()
        super().close()


def patiently(path: Any, action: Callable[[], _Result]) -> _Result:
    """Returns what an action over the network returns, tried again after each of `PAUSES`; raises `ConfigError` if all fail."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except ConfigError:
            raise
        except Exception as error:  # libraries of networks raise exceptions of many kinds
            if pause is None or _lasts(error):
                raise ConfigError(_explained(str(path), error, tries=1 if _lasts(error) else len(PAUSES) + 1)) from error
            time.sleep(pause)
    raise AssertionError


def _lasts(error: Exception) -> bool:
    """Returns whether another try would end as this one did."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, _LASTING) or type(error).__name__ == "OfflineModeIsEnabled"


def _explained(path: str, error: Exception, tries: int) -> str:
    if isinstance(error, ImportError):
        extra = "hub" if on_hub(path) else path.partition("://")[0].replace("gs", "gcs")
        return f"Reading {path} needs a package that is not installed ({one_line(error)}): pip install 'flax_switch[{extra}]'."
    if type(error).__name__ == "OfflineModeIsEnabled":
        return (
            f"{path} cannot be read in the hub's offline mode; unset HF_HUB_OFFLINE, or let {MIRROR} name a folder with a copy of "
            "the data set (in datasets/OWNER/NAME)."
        )
    often = f" after {tries} tries" if tries > 1 else ""
    return f"Cannot read {path}{often}: {one_line(error)}."
