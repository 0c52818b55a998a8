"""A teacher's probabilities on disk: of every target of the first training batches the most probable ids, by number of batch.

A folder holds `teacher.json`, which says what teacher, data and settings the probabilities are of and lists the other files with
their checksums, and `steps_N.npy`: of batches from N on an array [batches, B, T, k] of (id, probability), the most probable first.
Files are added, never changed; one that the list lacks is what a kill left, and is written again.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import check
from flax_switch.data.batches import Batch
from flax_switch.data.pipeline import Prepared
from flax_switch.host.files import checksum, expanded, write_bytes, write_text
from flax_switch.host.json_text import field, read_json

IDS, PROBS = "teacher_ids", "teacher_probs"  # in batches: [B, T, k]
BYTES_AT_ONCE = 2**26  # of a file; a kill costs what has been computed of one
LISTED = "teacher.json"
_PLACE = np.dtype([("id", np.int32), ("prob", np.float32)])


class CachedTeacher:
    """The probabilities in a folder, which may be none yet."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]):
        """Opens what is there. identity: what the probabilities depend on, JSON-able.

        Raises `ConfigError` where the folder's are of something else, naming what, and for a list that cannot be read.
        """
        self.folder, self.identity = expanded(folder), identity
        self._files: list[list[int]] = []  # first batch, number of batches, bytes, CRC-32
        self._arrays: dict[int, np.ndarray] = {}
        path = self.folder / LISTED
        if path.exists():
            listed = read_json(path)
            found, files = (field(listed, name, kind, str(path)) for name, kind in (("of", dict), ("files", list)))
            differing = [
                f"{name} was {found.get(name)!r}, is {value!r}" for name, value in identity.items() if found.get(name) != value
            ]
            check(
                not differing,
                f"The cached teacher in {self.folder} is of something else: {'; '.join(differing)}. Restore that, or name another "
                "folder in distillation.cached_teacher.",
            )
            ends = [first + count for first, count, _, _ in files]
            check([first for first, *_ in files] == [0, *ends][: len(files)], f"{path} has changed; {self._advice}")
            self._files = files

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return sum(count for _, count, _, _ in self._files)

    @property
    def _advice(self) -> str:
        return f"delete the folder {self.folder}, and it is made anew."

    def add(self, ids: np.ndarray, probs: np.ndarray) -> None:
        """Writes the next batches' [batches, B, T, k] behind those that are there."""
        places = np.empty(ids.shape, _PLACE)
        places["id"], places["prob"] = ids, probs
        buffer = io.BytesIO()
        np.save(buffer, places)
        content = buffer.getvalue()
        write_bytes(self._path(self.steps), content)
        self._files.append([self.steps, len(ids), len(content), zlib.crc32(content)])
        write_text(self.folder / LISTED, json.dumps({"of": self.identity, "files": self._files}) + "\n")

    def rows(self, batch: int, rows: np.ndarray | None) -> Batch:
        """Returns ids and probabilities of some rows (None: all) of a batch; raises `ConfigError` where they lack or changed."""
        check(
            batch < self.steps,
            f"The cached teacher in {self.folder} holds {self.steps} batches, and batch {batch} is asked for. Make it "
            "for as many train.steps first.",
        )
        at = bisect.bisect_right([first for first, *_ in self._files], batch) - 1
        places = self._array(at)[batch - self._files[at][0]]
        places = places if rows is None else places[rows]
        return {IDS: np.ascontiguousarray(places["id"]), PROBS: np.ascontiguousarray(places["prob"])}

    def _array(self, at: int) -> np.ndarray:
        if at not in self._arrays:
            first, _, size, crc = self._files[at]
            path = self._path(first)
            whole = path.is_file() and path.stat().st_size == size and checksum(path) == crc
            check(whole, f"{path} is missing or has changed since it was written; {self._advice}")
            self._arrays = {at: np.load(path, mmap_mode="r", allow_pickle=False)}  # one at a time: batches come in order
        return self._arrays[at]

    def _path(self, first: int) -> Path:
        return self.folder / f"steps_{first:08d}.npy"


@dataclasses.dataclass(frozen=True)
class Taught(Prepared):
    """Training text whose batches have a cached teacher's probabilities beside them."""

    cached: CachedTeacher

    @classmethod
    def of(cls, prepared: Prepared, cached: CachedTeacher) -> Taught:
        """Returns prepared text with a teacher's probabilities."""
        return cls(**{f.name: getattr(prepared, f.name) for f in dataclasses.fields(prepared)}, cached=cached)

    def train_iterator(self, rows: np.ndarray | None = None, num_workers: int | None = None) -> Any:
        """Returns `Prepared.train_iterator`'s batches with the probabilities of their rows."""
        return _TaughtIterator(super().train_iterator(rows, num_workers), self.cached, rows)


class _TaughtIterator:
    def __init__(self, batches: Any, cached: CachedTeacher, rows: np.ndarray | None):
        self._batches, self._cached, self._rows = batches, cached, rows

    def __next__(self) -> Batch:
        number = self._batches.get_state()["next_batch"]
        return {**next(self._batches), **self._cached.rows(number, self._rows)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
