"""What a mutation run prints, and the mutants that nobody can tell from the code they change."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mutation.operators import OPERATORS
from mutation.run import Result
from mutation.sites import Mutant


def equivalent_key(mutant: Mutant) -> tuple[str, str, str, str]:
    """What a file, its line before and after, and the operator say of a mutant."""
    return mutant.site.file, mutant.site.operator, mutant.was, mutant.becomes


def load_equivalents(file: Path) -> dict[tuple[str, str, str, str], str]:
    """The reason for each mutant that behaves as the code does; every entry must give one."""
    entries = json.loads(file.read_text("utf-8")) if file.is_file() else []
    for entry in entries:
        assert entry["reason"].strip(), f"{file}: an equivalent mutant needs the reason why it is one: {entry}"
    return {(e["file"], e["operator"], e["line"], e["becomes"]): e["reason"] for e in entries}


def survivors(results: Iterable[Result]) -> int:
    """How many the tests did not notice."""
    return sum(result.outcome == "survived" for result in results)


def print_drawn(drawn: list[Mutant]) -> None:
    """Prints the sites of a draw, and what each becomes."""
    for mutant in drawn:
        print(f"{mutant.site.file}:{mutant.site.line} {mutant.site.operator}\n    - {mutant.was}\n    + {mutant.becomes}")


def print_result(result: Result, number: int, count: int) -> None:
    """Prints a mutant as soon as its fate is known."""
    print(f"{number}/{count} {result.outcome} {result.file}:{result.line} {result.operator}: {result.by}", flush=True)
    if result.outcome == "survived":
        print(_diff(result), flush=True)


def _diff(result: Result) -> str:
    told = f"{result.covered} tests run it, {result.tests} ran" if result.covered else "no quick test runs it"
    return f"{result.file}:{result.line} {result.operator} ({told})\n    - {result.was}\n    + {result.becomes}"


def print_table(results: list[Result], drawn: int, seed: int, began: float) -> None:
    """Prints the survivors, and how many of each operator's and each room's mutants there were."""
    print("\nSurvivors")
    print("\n".join(_diff(r) for r in results if r.outcome == "survived") or "none")
    for title, key, names in (
        ("operator", lambda r: r.operator, OPERATORS),
        ("room", lambda r: r.file.split("/")[1], sorted({r.file.split("/")[1] for r in results})),
    ):
        print(f"\n| {title:<22} | drawn | killed | equivalent | survived |\n|{'-' * 24}|------:|-------:|-----------:|---------:|")
        for name in names:
            _print_row(name, [r for r in results if key(r) == name])
        _print_row("all", results)
    hung = Counter(r.by for r in results if r.outcome == "killed" and "::" not in r.by)
    minutes = (time.monotonic() - began) / 60
    tests = sum(r.seconds for r in results) / 60
    print(f"\nSeed {seed}: {len(results)} of {drawn} mutants known, {survivors(results)} survive; {tests:.1f} minutes of tests,")
    print(f"{minutes:.1f} minutes this time. Killed by something else than a failing test: {dict(hung) or 'none'}.")


def _print_row(name: str, results: list[Result]) -> None:
    count = Counter(r.outcome for r in results)
    print(f"| {name:<22} | {len(results):5} | {count['killed']:6} | {count['equivalent']:10} | {count['survived']:8} |")
