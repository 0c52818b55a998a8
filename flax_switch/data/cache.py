"""Tokenised corpora on disk: written once, complete or absent, and memory-mapped from then on.

A cache is a folder of four arrays and a `meta.json`. Its name is a fingerprint of the corpus, the vocabulary and the split:

    train.tokens, heldout.tokens      token ids of all documents end to end, uint16 where the ids fit, else uint32
    train.offsets, heldout.offsets    int64, where each document begins, and the end of the last
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich import get_console, progress

from flax_switch.config import ConfigError, check, one_of
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.host import files
from flax_switch.host.json_text import field, read_json

SPLITS = ("train", "heldout")
_VERSION = 1  # of the format; part of the fingerprint
_DOCUMENTS_AT_ONCE = 2000


class Tokens:
    """Documents as token ids, end to end."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        """Takes ids, and where each document begins, and the end of the last."""
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> Tokens:
        """Returns documents in memory."""
        ends = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        return cls(np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(ends[-1])), ends)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """Returns the token ids of document `i`."""
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]], np.int32)


class TokenStore(Tokens):
    """One split of a cache, memory-mapped. Pickles as its path, for worker processes."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = Path(folder).resolve(), split
        try:
            meta = read_json(self.folder / "meta.json")
            counts = field(field(meta, "splits", dict, "meta.json"), split, dict, "meta.json")
            self.fingerprint: str = field(meta, "fingerprint", str, "meta.json")
            dtype = field(meta, "dtype", str, "meta.json")
            one_of("dtype", dtype, ("uint16", "uint32"))
            for path in self.folder.iterdir():
                check(path.is_file(), f"{path.name} is no regular file")
            tokens, documents = (field(counts, name, int, "meta.json") for name in ("tokens", "documents"))
            super().__init__(
                _mapped(self.folder / f"{split}.tokens", np.dtype(dtype), tokens),
                _mapped(self.folder / f"{split}.offsets", np.dtype(np.int64), documents + 1),
            )
            _check_contents(self.folder, field(meta, "crc32", dict, "meta.json", {}))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The token cache {self.folder} is damaged ({error}); delete that folder and it is made anew."
            ) from error

    def __reduce__(self):
        return TokenStore, (self.folder, self.split)


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {count * dtype.itemsize}")
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


def _check_contents(folder: Path, checksums: dict[str, int]) -> None:
    """Raises `ValueError` for a file whose bytes are not those that were written; caches of 0.1.0 have no checksums."""
    for name, expected in checksums.items():
        if Path(name).name != name:
            raise ValueError(f"meta.json names {name!r}")
        if files.checksum(folder / name) != expected:
            raise ValueError(f"the contents of {name} have changed")


def is_heldout(document: str, fraction: float) -> bool:
    """Returns whether a hash of the document's text falls into the held-out fraction; the same wherever the document stands."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def tokenize(
    documents: Iterable[str],
    vocabulary: Vocabulary,
    cache_dir: Path,
    *,
    corpus_fingerprint: str,
    heldout_fraction: float,
    total_characters: int | None = None,
    quiet: bool = False,
) -> dict[str, TokenStore]:
    """Returns the cache of a corpus under a vocabulary, as {"train": store, "heldout": store}; made if it is not there yet.

    Raises `ConfigError` where the corpus is empty or the disk is full; then nothing is left behind.
    """
    key = f"{_VERSION} {corpus_fingerprint} {vocabulary.fingerprint} {heldout_fraction!r}"
    folder = cache_dir / f"tokens-{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}"
    if not folder.is_dir():
        with files.new_folder(folder) as temporary:
            _write(documents, vocabulary, temporary, heldout_fraction, total_characters, quiet)
    return {split: TokenStore(folder, split) for split in SPLITS}


def _write(
    documents: Iterable[str],
    vocabulary: Vocabulary,
    folder: Path,
    heldout_fraction: float,
    total_characters: int | None,
    quiet: bool,
) -> None:
    dtype = np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)
    ends: dict[str, list[int]] = {split: [0] for split in SPLITS}
    digest = hashlib.blake2b(vocabulary.fingerprint.encode(), digest_size=10)
    with open(folder / "train.tokens", "wb") as train, open(folder / "heldout.tokens", "wb") as heldout:
        opened = {"train": train, "heldout": heldout}
        for batch in _with_progress(documents, total_characters, quiet):
            for document, ids in zip(batch, vocabulary.encode_documents(batch), strict=True):
                if ids:
                    split = "heldout" if is_heldout(document, heldout_fraction) else "train"
                    content = np.asarray(ids, dtype).tobytes()
                    digest.update(len(ids).to_bytes(8, "little") + content)
                    opened[split].write(content)
                    ends[split].append(ends[split][-1] + len(ids))
    for split in SPLITS:
        (folder / f"{split}.offsets").write_bytes(np.asarray(ends[split], np.int64).tobytes())  # tofile does not say a disk is full
    check(any(ends[split][-1] for split in SPLITS), "The corpus is empty: no document of it has any text.")
    meta = {
        "fingerprint": digest.hexdigest(),
        "dtype": dtype.name,
        "crc32": {path.name: files.checksum(path) for path in sorted(folder.iterdir())},
        "splits": {split: {"documents": len(ends[split]) - 1, "tokens": ends[split][-1]} for split in SPLITS},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _with_progress(documents: Iterable[str], total_characters: int | None, quiet: bool) -> Iterator[list[str]]:
    """Yields the documents in batches, under a progress bar that counts their characters."""
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    remaining = iter(documents)
    if quiet or not get_console().is_terminal:  # rich before 14.3 prints an empty line for a bar that is disabled
        yield from iter(lambda: list(itertools.islice(remaining, _DOCUMENTS_AT_ONCE)), [])
        return
    with progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task("Tokenising the corpus", total=total_characters)
        while batch := list(itertools.islice(remaining, _DOCUMENTS_AT_ONCE)):
            yield batch
            bar.advance(task, sum(map(len, batch)))
