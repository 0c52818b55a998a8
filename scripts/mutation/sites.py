"""Every place of a source file where one of the ten operators applies, and the text that each would put there."""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutation.operators import changes_of, context_of, is_text

ROOMS = ("ops", "nn", "training", "generation", "data", "convert", "host", "inspection", "workflows")


@dataclass(frozen=True)
class Site:
    """A piece of a file, an operator that applies to it, and what may stand there instead."""

    file: str  # from the root of the checkout
    scope: str  # the function or class around it, as in a __qualname__
    operator: str
    line: int
    text: str  # the line where it begins, without its indentation
    start: int  # of the piece, in characters of the file
    end: int
    replacements: tuple[str, ...]
    occurrence: int  # among sites of the file with the same scope, text, operator and replacements
    lookups: tuple[range, ...]  # lines whose tests are its tests: the first range that any test runs counts

    def rank(self, seed: int) -> str:
        """A random number of the site's own: a draw takes the lowest, and so changes little where other code changes."""
        key = (seed, self.file, self.scope, self.text, self.operator, self.replacements, self.occurrence)
        return hashlib.sha256(repr(key).encode()).hexdigest()


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    site: Site
    replacement: str
    before: str  # the whole file
    after: str

    @property
    def name(self) -> str:
        """What identifies it as long as its line and those like it stay."""
        site = self.site
        key = (site.file, site.scope, site.text, site.operator, site.occurrence, self.becomes)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    @property
    def becomes(self) -> str:
        """The changed line, or lines, without indentation and line breaks."""
        return self._lines(self.after, len(self.before) - self.site.end)

    @property
    def was(self) -> str:
        """The same piece of the file before."""
        return self._lines(self.before, len(self.before) - self.site.end)

    def _lines(self, source: str, from_the_end: int) -> str:
        start = source.rfind("\n", 0, self.site.start) + 1
        end = source.find("\n", len(source) - from_the_end)
        return " ".join(source[start : end if end >= 0 else len(source)].split())


def all_sites(tree: Path) -> list[Site]:
    """The sites of every file of the rooms, in order of files and lines."""
    files = [path for room in ROOMS for path in sorted((tree / "flax_switch" / room).rglob("*.py"))]
    return [site for path in files for site in sites_of(path.relative_to(tree).as_posix(), path.read_text("utf-8"))]


def draw(sites: list[Site], seed: int, count: int, tree: Path) -> list[Mutant]:
    """`count` mutants of sites drawn by the seed, every site being equally likely.

    A change that does not compile, or that leaves the syntax tree as it was, is passed over.
    """
    ranked = iter(sorted(sites, key=lambda site: site.rank(seed)))
    mutants = (mutant_of(site, seed, (tree / site.file).read_text("utf-8")) for site in ranked)
    return list(itertools.islice((mutant for mutant in mutants if mutant is not None), count))


def mutant_of(site: Site, seed: int, source: str) -> Mutant | None:
    """The site's mutant, one of its replacements being taken by the seed; None where none is a change."""
    changed = [r for r in site.replacements if _is_a_change(source, source[: site.start] + r + source[site.end :])]
    if not changed:
        return None
    replacement = changed[int(site.rank(seed)[-8:], 16) % len(changed)]
    return Mutant(site, replacement, source, source[: site.start] + replacement + source[site.end :])


def _is_a_change(before: str, after: str) -> bool:
    try:
        return ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    except SyntaxError:
        return False


def sites_of(file: str, source: str) -> list[Site]:
    """The sites of one file."""
    offsets, seen, sites = Offsets(source), Counter(), []
    for node, place in _Walk(ast.parse(source)).places():
        for changes in changes_of(node, place.context, place.imported):
            replacements = tuple(dict.fromkeys(changes.replacements(source, offsets)))
            start, end = offsets.span(node)
            text = offsets.lines[node.lineno - 1].strip()
            key = (place.scope, text, changes.operator, replacements)
            lookups = (range(node.lineno, node.end_lineno + 1), place.statement, *place.owners)
            sites.append(Site(file, *key[:1], changes.operator, node.lineno, text, start, end, replacements, seen[key], lookups))
            seen[key] += 1
    return sites


class Offsets:
    """Where nodes lie in a source, in characters; the syntax tree counts bytes of a line."""

    def __init__(self, source: str):
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """(first character, the one after the last)."""
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())


@dataclass(frozen=True)
class Place:
    """Where a node stands."""

    scope: str
    context: str  # "", or how the node is meant where that decides the operator: "axis", "default"
    statement: range  # lines of the statement around it, without a block's body
    owners: tuple[range, ...]  # bodies whose tests run what a line does that runs at import only
    imported: frozenset[str]


class _Walk:
    """Goes through a module and leaves out annotations, docstrings, raised and logged texts, and f-strings."""

    def __init__(self, module: ast.Module):
        self.module = module
        imports = [n for n in ast.walk(module) if isinstance(n, ast.Import | ast.ImportFrom)]
        self.imported = frozenset((a.asname or a.name).split(".")[0] for n in imports for a in n.names)
        bodies = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]
        self.functions = tuple(_body(n) for n in bodies)

    def places(self) -> Iterator[tuple[ast.AST, Place]]:
        """Every node where an operator may apply."""
        yield from self._children(self.module, Place("", "", range(0), (), self.imported))

    def _children(self, node: ast.AST, place: Place) -> Iterator[tuple[ast.AST, Place]]:
        for field, child in _fields(node):
            if is_text(node, field, child):
                continue
            yield from self._visit(child, self._inside(node, field, child, place))

    def _visit(self, node: ast.AST, place: Place) -> Iterator[tuple[ast.AST, Place]]:
        yield node, place
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            owner = (_body(node),) if isinstance(node, ast.FunctionDef) else ()
            scope = f"{place.scope}.{node.name}".lstrip(".")
            yield from self._children(node, Place(scope, "", place.statement, (*owner, *self.functions), self.imported))
        else:
            yield from self._children(node, place)

    def _inside(self, parent: ast.AST, field: str, child: ast.AST, place: Place) -> Place:
        statement = _header(child) if isinstance(child, ast.stmt) else place.statement
        owners = place.owners or self.functions
        return Place(place.scope, context_of(parent, field, child, place.context), statement, owners, place.imported)


def _fields(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield field, child


def _body(node: ast.AST) -> range:
    return range(node.body[0].lineno, node.end_lineno + 1)


def _header(node: ast.stmt) -> range:
    body = getattr(node, "body", None)
    return range(node.lineno, max(body[0].lineno, node.lineno + 1) if body else node.end_lineno + 1)
