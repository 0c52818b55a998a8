"""Compiled programs kept from one run of a command to the next, in the user's cache folder.

JAX decides what an entry holds and what it is called; the files are ours, since JAX's are neither written at one go (a kill leaves
half of one for good) nor keyed by what the CPU can do, and bounding their size takes a lock that other processes wait for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError
from flax_switch.host.files import cache_folder, expanded, write_bytes
from flax_switch.host.jax_settings import jax_setting

ENVIRONMENT = "FLAX_SWITCH_COMPILE_CACHE"  # names another folder
LIMIT = 2 * 2**30  # bytes of all entries together
_SUFFIX, _DIGEST = ".xla", 32  # bytes of the digest before an entry's content
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to no living writer

log = logging.getLogger(__name__)


def use_compile_cache(off: bool = False) -> Path | None:
    """Turns the cache on for this process, and returns its folder; None where it is off or not ours.

    A folder that JAX was given (JAX_COMPILATION_CACHE_DIR) stays JAX's own affair. What is compiled and what is read back give the
    same results to the bit; an entry that cannot be read or trusted costs a compilation, and nothing else.
    """
    import jax

    if off:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if jax_setting("jax_compilation_cache_dir") is not None:
        return None
    try:  # JAX has no public place for the files of a cache
        folder = compile_cache_folder()
        inner: Any = importlib.import_module("jax._src.compilation_cache")
        inner.get_file_cache  # noqa: B018 - there, or no cache
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        entries = CompileCache(folder)
    except (ImportError, AttributeError, OSError, ConfigError) as error:
        log.info("Programs are compiled anew in every run: %s", error)
        return None
    inner.get_file_cache = lambda path: (entries, path)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # these would be files without bound
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def compile_cache_folder() -> Path:
    """Returns the folder of compiled programs: the environment variable's, else `xla` in the user's cache folder."""
    named = os.environ.get(ENVIRONMENT)
    return expanded(named) if named else cache_folder(None) / "xla"


class CompileCache:
    """A folder of compiled programs, bounded in size, that any number of processes read and write at once.

    An entry appears when it is complete, carries a digest of its content, and is used only by who wrote it and on a CPU like the
    one it was compiled on. The least recently used go first. Nothing raises: what cannot be read is not there, and what cannot be
    written is not kept.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        """Takes a folder that is there, and the bytes that it may hold."""
        self._path, self._limit = folder, limit  # `_path` is the name that JAX knows
        versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
        self._machine = repr({**versions, **machine()})

    def get(self, key: str) -> bytes | None:
        """Returns an entry's content, or None."""
        place = self._place(key)
        with contextlib.suppress(OSError):
            with open(place, "rb") as file:
                if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid != os.geteuid():
                    return None  # programs of others are not run
                digest, content = file.read(_DIGEST), file.read()
            if digest == self._digest(key, content):
                os.utime(place)
                return content
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps an entry, in place of a damaged one, and removes the least recently used beyond the limit."""
        if len(value) + _DIGEST > self._limit:
            return
        with contextlib.suppress(OSError, ConfigError):
            self._make_room(len(value) + _DIGEST)
            write_bytes(self._place(key), self._digest(key, value) + value)

    def _make_room(self, size: int) -> None:
        held = []
        for file in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                about = file.stat()
                if file.suffix == _SUFFIX:
                    held.append((about.st_mtime, about.st_size, file))
                elif ".tmp-" in file.name and time.time() - about.st_mtime > _ABANDONED:
                    file.unlink()
        excess = sum(bytes_ for _, bytes_, _ in held) + size - self._limit
        for _, bytes_, file in sorted(held):
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= bytes_

    def _place(self, key: str) -> Path:
        program = "".join(c if c.isalnum() else "_" for c in key.rpartition("-")[0])[:60]
        name = hashlib.blake2b(key.encode(), key=hashlib.sha256(self._machine.encode()).digest(), digest_size=20).hexdigest()
        return self._path / f"{program}-{name}{_SUFFIX}"

    def _digest(self, key: str, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=_DIGEST, salt=b"1", key=hashlib.sha256(key.encode()).digest()).digest()


@functools.cache
def machine() -> dict[str, str]:
    """Returns what a program for the CPU depends on besides its text and versions: the CPU's features, how many threads it gets."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"threads": str(threads), "NPROC": os.environ.get("NPROC", "")}
    found |= {"system": platform.system(), "machine": platform.machine(), "model": os.environ.get("PROCESSOR_IDENTIFIER", "")}
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
        lines = [line.partition(":") for line in first.splitlines()]
        found |= {name.strip(): value.strip() for name, _, value in lines if name.strip() in wanted}
    return found
