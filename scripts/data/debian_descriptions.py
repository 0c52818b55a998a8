"""Summarization and translation data from the package descriptions of a Debian or Ubuntu archive.

    python scripts/data/debian_descriptions.py data/debian                    # on Debian or Ubuntu: asks apt, as an ordinary user
    python scripts/data/debian_descriptions.py data/debian --files FOLDER     # elsewhere: files of a mirror, see --help

Every package has a one-line synopsis and a description of a few sentences; volunteers have translated tens of thousands of them.
What is written into the folder:

    summarization/{train,validation,test}.jsonl       {"package", "description", "synopsis"}
    translation/en-LL/{train,validation,test}.jsonl   {"package", "en", "LL"}: synopses, and descriptions paragraph by paragraph
    translation/en-LL/synopses/...                    the synopses among them: short and quick to learn
    corpus/LL.txt                                     descriptions of the training split, one a line, no paragraph twice
    README.md                                         where it is from, how it was split, how much there is

Pairs are unique, and families of packages are in one split together in every file: packages of one source, sources of one name but
for what follows a hyphen or a number, and packages whose descriptions are near copies. The same archive gives the same files.

The corpora are text to pre-train on. No synopsis is in them.

Needs Python alone.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ELSEWHERE = """Elsewhere than on Debian or Ubuntu, download these files from a mirror such as
http://deb.debian.org/debian/dists/stable/main, whole or compressed (.bz2, .xz, .gz), into one folder and name it with --files:
i18n/Translation-en, -it, -fr and -de, and binary-amd64/Packages. Or run this script in a container:
docker run --rm -v "$PWD:/here" -w /here debian:stable sh -c 'apt-get update && apt-get install -y python3 && python3 ...'"""
SPLITS = {"test": 0.05, "validation": 0.05, "train": 0.90}
APT_HELPER = "/usr/lib/apt/apt-helper"
OPENERS = {".bz2": bz2.open, ".xz": lzma.open, ".gz": gzip.open}

SHORTEST, LONGEST = 60, 4000  # characters of a description that is worth summarizing
MOST_SOURCES = 30  # sources that share the beginning of a name are a family, more are a namespace such as golang- or python-
LARGEST_FAMILY = 300  # packages; larger families are in the training split
NEAR = 0.5  # Jaccard similarity of two descriptions' word triples from which they are near copies
SKETCH = 8  # triples by which copies are looked for: of pairs that share half of their triples it misses one in 250
RECENT = 20  # texts with the same rare triple to compare with; a boilerplate sentence may have thousands

SENTENCE_END = r"(?<=[.!?])\s+(?=[A-Z])"  # a full stop, question mark or exclamation mark with a space and a capital after it


@dataclass(frozen=True)
class Entry:
    """A package's English description; `md5` is what translations name it by."""

    package: str
    md5: str
    synopsis: str
    paragraphs: tuple[str, ...]

    @property
    def description(self) -> str:
        return " ".join(self.paragraphs)


# --- reading
def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The fields of each stanza of a control file; continuation lines keep their indentation."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def synopsis_and_paragraphs(text: str) -> tuple[str, tuple[str, ...]]:
    """A Description field taken apart: ' .' ends a paragraph; lines of lists are joined as all others are."""
    synopsis, *lines = text.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append([])
        else:
            paragraphs[-1] += line.split()
    return " ".join(synopsis.split()), tuple(" ".join(words) for words in paragraphs if words)


def english(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries of a Translation-en file."""
    for fields in stanzas(lines):
        if {"Package", "Description-md5", "Description-en"} <= fields.keys():
            yield Entry(fields["Package"], fields["Description-md5"], *synopsis_and_paragraphs(fields["Description-en"]))


def translated(lines: Iterable[str], language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Synopsis and paragraphs in a language by the md5 of the English description."""
    name = f"Description-{language}"
    return {f["Description-md5"]: synopsis_and_paragraphs(f[name]) for f in stanzas(lines) if {"Description-md5", name} <= f.keys()}


def sources_of(lines: Iterable[str]) -> dict[str, str]:
    """The source of each package of a Packages file."""
    return {f["Package"]: f.get("Source", f["Package"]).split()[0] for f in stanzas(lines) if "Package" in f}


class Archive:
    """The index files of an archive, wherever they are."""

    def __init__(self, folder: Path):
        self._files = sorted(path for path in folder.iterdir() if path.is_file())

    def lines(self, index: str) -> Iterator[str]:
        """The lines of all files of an index, such as Translation-en or Packages."""
        for path in self._files:
            if re.search(rf"(^|_){index}(\.\w+)?$", path.name):
                with _open(path) as file:
                    yield from file
                yield "\n"

    @property
    def origin(self) -> list[str]:
        """What the release files call themselves."""
        texts = (path.read_text(encoding="utf-8") for path in self._files if path.name.endswith("Release"))
        found = [dict(re.findall(r"^(Origin|Label|Codename|Date): (.*)$", text, re.M)) for text in texts]
        return [", ".join(f"{name} {value}" for name, value in release.items()) for release in found]


def _open(path: Path) -> IO[str]:
    if path.suffix in (".lz4", ".zst"):  # as apt keeps them; it knows how to read them
        content = subprocess.run([APT_HELPER, "cat-file", str(path)], stdout=subprocess.PIPE, check=True).stdout
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    return OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8")


def update(lists: Path, languages: list[str]) -> None:
    """Has apt fetch the indices of the machine's archives into a folder of ours; the system's own stay as they are."""
    if shutil.which("apt-get") is None or not Path(APT_HELPER).exists():
        sys.exit(f"There is no apt here. {ELSEWHERE}")
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    settings = {"Dir::State::lists": lists.resolve(), "Acquire::Languages": ",".join(["en", *languages])}
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    result = subprocess.run(["apt-get", "update", *options])
    if result.returncode:
        sys.exit(f"apt-get update failed (its message is above). Without a network connection, connect and run again.\n{ELSEWHERE}")


# --- families
class Families:
    """Disjoint sets of packages."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, item: str) -> str:
        """The representative of an item's set."""
        root = item
        while (above := self._parent.setdefault(root, root)) != root:
            root = above
        while (above := self._parent[item]) != root:
            self._parent[item], item = root, above
        return root

    def join(self, a: str, b: str) -> None:
        """Makes one set of two; the representative is the first in the alphabet, so the order of joins does not matter."""
        first, second = sorted((self.find(a), self.find(b)))
        self._parent[second] = first


def stem(source: str, sources_with: collections.Counter[str]) -> str:
    """The beginning of a source's name that is no namespace: llvm-toolchain-14 and -15 share llvm, two golang-s nothing."""
    for prefix in _prefixes(source):
        if sources_with[prefix] <= MOST_SOURCES:
            return prefix
    return source


def _prefixes(source: str) -> list[str]:
    """'a', 'a-b', 'a-b-c' of a-b1.2-c, numbers at the end of each part left out."""
    parts = [re.sub(r"[\d.]+$", "", part) or part for part in source.split("-")]
    return ["-".join(parts[: i + 1]) for i in range(len(parts))]


def triples(text: str) -> set[int]:
    """Hashes of the word triples of a text; letter case, digits and punctuation aside."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {zlib.crc32(" ".join(words[i : i + 3]).encode()) for i in range(max(len(words) - 2, 1))}


def near_copies(texts: list[str]) -> Iterator[tuple[int, int]]:
    """Pairs of indices of texts with at least NEAR of their word triples in common.

    The smallest hashes of a text are a random draw of its triples: texts that share one are compared, with those last seen.
    """
    shingles = [triples(text) for text in texts]
    buckets: dict[int, list[int]] = collections.defaultdict(list)
    for i, own in enumerate(shingles):
        compared: set[int] = set()
        for smallest in sorted(own)[:SKETCH]:
            bucket = buckets[smallest]
            for j in bucket[-RECENT:]:
                if j not in compared:
                    compared.add(j)
                    if len(own & shingles[j]) >= NEAR * len(own | shingles[j]):
                        yield j, i
            bucket.append(i)


def split_of(entries: list[Entry], source_of: dict[str, str]) -> dict[str, str]:
    """The split of each package; a family's is drawn by a hash of its first name, so it is the same in every release."""
    packages = [entry.package for entry in entries]
    sources = {source_of.get(package, package) for package in packages}
    sources_with = collections.Counter(prefix for source in sources for prefix in _prefixes(source))
    families = Families()
    for package in packages:
        families.join(package, f" {stem(source_of.get(package, package), sources_with)}")
    for i, j in near_copies([entry.description for entry in entries]):
        families.join(packages[i], packages[j])
    family = {package: families.find(package) for package in packages}
    sizes = collections.Counter(family.values())
    return {p: "train" if sizes[f] > LARGEST_FAMILY else _drawn(f) for p, f in family.items()}


def _drawn(name: str) -> str:
    place = _hash(name)
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    return "train"


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


# --- pairs
def summaries(entries: list[Entry]) -> Iterator[dict[str, str]]:
    """Description and synopsis, one pair for all packages whose descriptions begin with the same sentence or synopses agree.

    Of these, such as a program, its library and its documentation, the package with the shortest name stays.
    """
    seen: set[str] = set()
    for entry in sorted(entries, key=lambda entry: (len(entry.package), entry.package)):
        keys = {first_sentence(entry.description).lower(), entry.synopsis.lower()}
        if SHORTEST <= len(entry.description) <= LONGEST and len(entry.synopsis.split()) >= 2 and not keys & seen:
            seen |= keys
            yield {"package": entry.package, "description": entry.description, "synopsis": entry.synopsis}


def first_sentence(text: str) -> str:
    return re.split(SENTENCE_END, text, maxsplit=1)[0]


def translations(entries: list[Entry], foreign: dict[str, tuple[str, tuple[str, ...]]], language: str) -> Iterator[dict[str, str]]:
    """Synopses, and paragraphs where both sides have the same number of them, without repetitions and left-overs in English."""
    seen: set[str] = set()
    for entry in entries:
        if entry.md5 not in foreign:
            continue
        synopsis, paragraphs = foreign[entry.md5]
        sides = [(entry.synopsis, synopsis)]
        if len(paragraphs) == len(entry.paragraphs):
            sides += zip(entry.paragraphs, paragraphs, strict=True)
        for source, target in sides:
            plausible = 0.4 < len(source) / max(len(target), 1) < 2.5 and len(source) >= 3
            if plausible and "<trans>" not in target and source.lower() != target.lower() and source.lower() not in seen:
                seen.add(source.lower())
                yield {"package": entry.package, "en": source, language: target}


def unrepeated(documents: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Each document's paragraphs that no earlier document has, joined; what is too short then is left out."""
    seen: set[str] = set()
    for paragraphs in documents:
        document = " ".join(paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen)
        seen.update(paragraphs)
        if len(document) >= SHORTEST:
            yield document


# --- writing
def build(archive: Archive, folder: Path, languages: list[str], say: Callable[[str], None] = print) -> dict[str, dict[str, int]]:
    """Writes everything into `folder`; returns how many pairs there are, by file and split."""
    by_md5 = {entry.md5: entry for entry in english(archive.lines("Translation-en")) if entry.paragraphs}
    entries = sorted(by_md5.values(), key=lambda entry: (entry.package, entry.md5))
    if not entries:
        sys.exit(f"No English descriptions were found (no Translation-en, or an empty one). {ELSEWHERE}")
    source_of = sources_of(archive.lines("Packages"))
    say(f"{len(entries):,} English descriptions of {len({e.package for e in entries}):,} packages; finding families.")
    split = split_of(entries, source_of)
    counts, lengths = {}, ""
    pairs = list(summaries(entries))
    counts["summarization"] = _write_pairs(folder / "summarization", pairs, split)
    if pairs:
        words = [statistics.mean(len(pair[name].split()) for pair in pairs) for name in ("description", "synopsis")]
        lengths = f"Descriptions have {words[0]:.1f} words in the mean, synopses {words[1]:.1f}.\n"
    texts = {"en": [e.paragraphs for e in entries if split[e.package] == "train"]}
    for language in languages:
        foreign = translated(archive.lines(f"Translation-{language}"), language)
        pairs = list(translations(entries, foreign, language))
        name = f"translation/en-{language}"
        counts[name] = _write_pairs(folder / name, pairs, split)
        synopses = {entry.synopsis for entry in entries}
        counts[f"{name}/synopses"] = _write_pairs(folder / name / "synopses", (p for p in pairs if p["en"] in synopses), split)
        texts[language] = [foreign[e.md5][1] for e in entries if e.md5 in foreign and split[e.package] == "train"]
    for language, documents in texts.items():
        lines = [f"{document}\n" for document in unrepeated(documents)]
        _write(folder / "corpus" / f"{language}.txt", lines)
        counts[f"corpus/{language}.txt"] = {"train": len(lines)}
    _write(folder / "README.md", [_readme(archive.origin, counts, lengths, bool(source_of))])
    return counts


def _write_pairs(folder: Path, pairs: Iterable[dict[str, str]], split: dict[str, str]) -> dict[str, int]:
    by_split: dict[str, list[dict[str, str]]] = {name: [] for name in ("train", "validation", "test")}
    for pair in sorted(pairs, key=lambda pair: _hash(pair["package"])):  # so that the first so many are a sample
        by_split[split[pair["package"]]].append(pair)
    return {name: _write_json(folder / f"{name}.jsonl", some) for name, some in by_split.items()}


def _write_json(path: Path, records: list[dict[str, str]]) -> int:
    _write(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return len(records)


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _readme(origin: list[str], counts: dict[str, dict[str, int]], lengths: str, with_sources: bool) -> str:
    names = ("train", "validation", "test")
    rows = [f"| {file} | {' | '.join(f'{count.get(name, 0):,}' for name in names)} |" for file, count in counts.items()]
    grouped = "packages of one source, near copies" if with_sources else "near copies; no Packages index told their sources"
    return "\n".join(
        [
            "# Package descriptions as data\n",
            "Made by `scripts/data/debian_descriptions.py` of the descriptions in these archives:\n",
            *(f"- {name}" for name in origin or ["index files without a release file"]),
            f"\nFamilies of packages ({grouped}) are in one split. The texts are under the licences of the archive's packages",
            "and of its translations.\n",
            "| | train | validation | test |\n|---|---|---|---|",
            *rows,
            f"\n{lengths}",
        ]
    )  # fmt: skip


def main() -> None:
    """Fetches the indices, or reads those of --files, and writes the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=ELSEWHERE)
    parser.add_argument("folder", type=Path, help="for the data; made where it is not there")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="index files that are there, instead of asking apt")
    parser.add_argument("--languages", nargs="*", default=["it", "fr", "de"], metavar="LL", help="default: it fr de")
    args = parser.parse_args()
    if args.files is not None and not args.files.is_dir():
        sys.exit(f"--files {args.files} is no folder. {ELSEWHERE}")
    lists = args.files
    if lists is None:
        lists = args.folder / "lists"
        update(lists, args.languages)
    counts = build(Archive(lists), args.folder, args.languages)
    for name, by_split in counts.items():
        print(f"{name:32}" + "  ".join(f"{split} {count:,}" for split, count in by_split.items()))
    print(f"Written to {args.folder}")


if __name__ == "__main__":
    main()
