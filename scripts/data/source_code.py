"""Text to pre-train on: the source code of the Python packages that are installed, without copies.

    python scripts/data/source_code.py data/code                       # the standard library and all installed packages
    python scripts/data/source_code.py data/code --folders src other   # files below folders of your own

Written is FOLDER/code.txt, functions, classes and the rest of each file as documents with an empty line between them (empty lines
inside a document are taken out), and how much there is. A document that begins and ends as an earlier one of its length is a copy.
The same installation gives the same file. Needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 200  # characters of a document
LARGEST = 200_000  # bytes of a file; larger ones are tables that a program wrote


def main() -> None:
    """Collects, drops copies and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where code.txt goes")
    parser.add_argument("--folders", nargs="+", type=Path, help="default: the standard library and site-packages")
    parser.add_argument("--endings", nargs="+", default=[".py"], help="of the files to read")
    parser.add_argument("--characters", type=int, help="at most about so many: documents drawn by a hash of their text")
    args = parser.parse_args()
    folders = args.folders or [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    args.folder.mkdir(parents=True, exist_ok=True)
    documents = list(without_copies(document for folder in folders for document in documents_in(folder, tuple(args.endings))))
    documents = at_most(documents, args.characters)
    path = args.folder / "code.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters: {path}")


def documents_in(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """Yields the documents of all files below a folder, in the order of their names; files that are no UTF-8 are left out."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in endings and path.is_file() and path.stat().st_size <= LARGEST:
            try:
                yield from documents_of(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def documents_of(source: str) -> Iterator[str]:
    """Yields what begins at the left margin as a definition or a decorator, and what lies between, if it is long enough."""
    lines: list[str] = []
    for line in source.splitlines():
        stripped = line.rstrip()
        begins = stripped.startswith(("def ", "class ", "async def ", "@"))
        if begins and lines and not lines[-1].startswith("@"):
            yield from _long_enough(lines)
            lines = []
        if stripped:
            lines.append(stripped)
    yield from _long_enough(lines)


def _long_enough(lines: list[str]) -> Iterator[str]:
    document = "\n".join(lines)
    if len(document) >= SHORTEST:
        yield document


def without_copies(documents: Iterator[str]) -> Iterator[str]:
    """Yields each document once; two are copies where length, beginning and end are the same."""
    seen: set[tuple[int, str, str]] = set()
    for document in documents:
        shape = (len(document), document[:200], document[-200:])
        if shape not in seen:
            seen.add(shape)
            yield document


def at_most(documents: list[str], characters: int | None) -> list[str]:
    """Returns the share of the documents, drawn by a hash of each, that is expected to have so many characters."""
    share = 1.0 if characters is None else characters / max(sum(map(len, documents)), 1)
    digests = (hashlib.blake2b(document.encode(), digest_size=8).digest() for document in documents)
    return [d for d, digest in zip(documents, digests, strict=True) if int.from_bytes(digest, "big") < share * 2**64]


if __name__ == "__main__":
    main()
