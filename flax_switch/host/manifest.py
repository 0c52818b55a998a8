"""A checkpoint's manifest: the size and a checksum of every file below its folder, so that damage is noticed before it is used.

`manifest.json` is written last, and holds a checksum of itself. In object storage there is none: the store sums up its objects.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from flax_switch.config import ConfigError, check
from flax_switch.host.files import checksum, in_store, write_text
from flax_switch.host.json_text import field, read_json

MANIFEST = "manifest.json"
SINCE_VERSION = 2  # of `meta/metadata`: folders of that and later versions have a manifest

Files = dict[str, list[int]]  # path below the folder, with "/" -> [bytes, CRC-32]


def measure(folder: Path, wanted: Callable[[str], bool]) -> Files:
    """Returns the sizes and checksums of the files below a folder whose paths are wanted; reads each of them once."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: _measured(found[name]) for name in sorted(found) if wanted(name)}


def write_manifest(folder: Path, files: Files) -> None:
    """Writes the manifest, complete or not at all."""
    write_text(folder / MANIFEST, _text(files))


def _text(files: Files) -> str:
    own = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    return json.dumps({"crc32": own, "files": files}, sort_keys=True, indent=1) + "\n"


def damage(step: epath.PathLike, part: str = "", share: tuple[int, int] = (0, 1)) -> str | None:
    """Says what is wrong with a checkpoint's folder: a file that is missing, cut or changed. None where all is as it was written.

    Folders of 0.1.0, which have no manifest, and those in object storage count as whole.

    Args:
      part: the beginning of the paths that are read, such as "params/"; others are passed over.
      share: (i, n): every n-th file from the i-th on, for the i-th of n processes.
    """
    if in_store(step):
        return None
    step = Path(step)
    try:
        if not has_manifest(step):
            return f"{MANIFEST} is missing" if _version(step) >= SINCE_VERSION else None
        files = field(read_json(step / MANIFEST), "files", dict, MANIFEST)
        as_written = (step / MANIFEST).read_text(encoding="utf-8") == _text(files)
        check(as_written and all(len(entry) == 2 for entry in files.values()), "it is another text")
    except (ConfigError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"the contents of {MANIFEST} have changed" if not isinstance(error, OSError) else str(error)
    names = sorted(name for name in files if name.startswith(part))[share[0] :: share[1]]
    with ThreadPoolExecutor() as readers:
        return next(filter(None, readers.map(lambda name: _difference(step / name, name, files[name]), names)), None)


def has_manifest(step: epath.PathLike) -> bool:
    """Returns whether a folder has a manifest."""
    return not in_store(step) and (Path(step) / MANIFEST).exists()


def _difference(path: Path, name: str, expected: list[int]) -> str | None:
    try:
        size, own = path.stat().st_size, expected[0]
        if size != own:
            return f"{name} has {size:,} bytes instead of {own:,}"
        return None if _measured(path) == expected else f"the contents of {name} have changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"


def _measured(path: Path) -> list[int]:
    return [path.stat().st_size, checksum(path)]


def _version(step: Path) -> int:
    """Returns the version that a checkpoint says it has; 0 where it cannot be read."""
    try:
        return field(read_json(step / "meta" / "metadata"), "version", int, str(step))
    except ConfigError:
        return 0
