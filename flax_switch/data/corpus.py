"""The embedded default corpus: the English prose that every installation of Python and of this library carries.

Python's language reference (`pydoc_data.topics`), the docstrings of the standard library and the docstrings of the core
dependencies are read from their source files with `ast`; nothing is imported and nothing is downloaded. What is found depends
on the installed versions, so the text is cached under a key of them, and token caches are keyed by the text itself.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from flax_switch.config import check
from flax_switch.data import prose
from flax_switch.host import files

# Import name -> distribution, in the order they are read: earlier copies of a shared paragraph stay, later ones go.
DEPENDENCIES = {
    "numpy": "numpy", "scipy": "scipy", "jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint",
    "etils": "etils", "grain": "grain", "absl": "absl-py", "ml_collections": "ml_collections", "rich": "rich",
    "treescope": "treescope", "opt_einsum": "opt_einsum", "fsspec": "fsspec", "jaxtyping": "jaxtyping",
}  # fmt: skip
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_vendor",
    "vendored",
    "lib2to3",
}
_LONG_STRING = re.compile(rb'''"""(.*?)"""''', re.DOTALL)
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_VERSION = 2  # of the extraction and its file; raise it when either changes


def default_corpus(cache_dir: Path, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Returns documents of prose, in a fixed order, without duplicates; extracted once for the installed versions, then cached.

    A document is the prose of one docstring or one chapter of the language reference, on one line. `say` hears of the extraction,
    which takes some seconds. Raises `ConfigError` where the installation carries no documentation.
    """
    path = cache_dir / f"default-corpus-{_key()}.txt"
    if not path.exists():
        say("Extracting the embedded corpus from the documentation of this Python and its packages.")
        documents = extract()
        check(
            sum(map(len, documents)) >= 100_000,
            "This Python carries almost no documentation (its standard library's source files are missing), so there is no "
            "embedded corpus to train on; set data.source to files of your own.",
        )
        text = "\n".join(documents)
        files.write_text(path, f"{_digest(text.encode())}\n{text}")
    digest, _, text = files.read_bytes(path).partition(b"\n")
    check(
        digest.decode(errors="replace") == _digest(text),
        f"The contents of {path} have changed; delete that file and it is made anew.",
    )
    return text.decode().split("\n")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def extract() -> list[str]:
    """Reads, cleans and de-duplicates the corpus from the installed source files, in a few seconds."""
    with _quick_parsing():
        return deduplicated(prose.paragraphs(text) for text in _texts())


def by_origin() -> dict[str, list[str]]:
    """Returns the documents of `extract`, in its order, by where they are from: the language reference, the library, a package."""
    seen: set[str] = set()
    with _quick_parsing():
        return {name: deduplicated(map(prose.paragraphs, texts), seen) for name, texts in _origins()}


@contextlib.contextmanager
def _quick_parsing() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles; without the collector, building them takes 40 % of the time
    try:
        with warnings.catch_warnings(action="ignore"):  # parsing complains about others' escape sequences
            yield
    finally:
        if collecting:
            gc.enable()


def deduplicated(documents: Iterable[list[str]], seen: set[str] | None = None) -> list[str]:
    """Joins each document's paragraphs that no earlier document has (letter case and punctuation aside); drops empty ones.

    `seen` holds what calls before this one have found, and is added to.
    """
    seen = set() if seen is None else seen

    def is_new(text: str) -> bool:
        shape = re.sub(r"[^a-z]+", " ", text.lower()).strip()
        known = shape in seen
        seen.add(shape)
        return not known

    kept = []
    for paragraphs in documents:
        new = [paragraph for paragraph in paragraphs if is_new(paragraph)]
        if len(new) == 1 or (new and is_new(" ".join(new))):
            kept.append(" ".join(new))
    return kept


def _texts() -> Iterator[str]:
    return itertools.chain.from_iterable(texts for _, texts in _origins())


def _origins() -> Iterator[tuple[str, Iterator[str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    yield "Python's reference", _topics(library / "pydoc_data" / "topics.py")
    yield "Python's library", _docstrings(library)
    for package in DEPENDENCIES:
        spec = importlib.util.find_spec(package)
        roots = (spec.submodule_search_locations or ()) if spec else ()
        yield package, itertools.chain.from_iterable(_docstrings(Path(root)) for root in roots)


def _topics(path: Path) -> Iterator[str]:
    """Yields the chapters of the language reference: the strings of one dict literal."""
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
            return


def _docstrings(root: Path) -> Iterator[str]:
    for path in _source_files(root):
        open_nodes: list[_Documented] = [tree] if (tree := _parse(path)) else []
        while open_nodes:
            node = open_nodes.pop()
            text = ast.get_docstring(node)
            if text:
                yield text
            # Functions inside functions and definitions under an `if` are few, and walking every node is slow.
            open_nodes += [child for child in reversed(node.body) if isinstance(child, _DOCUMENTED)]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py") and not name.endswith("_test.py"))


def _parse(path: Path) -> ast.Module | None:
    """Returns the syntax tree, or None for a file that this Python cannot parse or that holds little but code (for speed)."""
    try:
        source = path.read_bytes()
        documentation = sum(map(len, _LONG_STRING.findall(source)))
        return ast.parse(source) if documentation > 0.1 * len(source) else None
    except (OSError, SyntaxError, ValueError):
        return None


def _key() -> str:
    """Changes with the versions of Python and of the packages that are read."""
    versions = [f"python {sys.version_info[:3]}", f"extraction {_VERSION}"]
    for distribution in DEPENDENCIES.values():
        try:
            versions.append(f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{distribution} absent")
    return hashlib.blake2b("\n".join(versions).encode(), digest_size=8).hexdigest()
