"""Tells which small changes of the code the quick tests do not notice: `bash scripts/test.sh --mutate`; see docs/testing.md.

Draws sites by a seed from every place where an operator applies, changes one at a time in a copy of the tree, and runs the tests
that cover it. Stops and goes on where it was: what is known of the tree as it is stays in `.mutation`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).resolve().parents[1]
EQUIVALENTS = ROOT / "scripts" / "mutation_equivalents.json"

from mutation import coverage_map, report, run, sites, warm  # noqa: E402 - they lie beside this file
from mutation.plan import covering_tests  # noqa: E402


def main() -> int:
    """0 where few enough mutants survive, 1 where too many do, 3 where the time given was too short to tell."""
    options = _options()
    began = time.monotonic()
    until = began + 60 * options.minutes
    drawn = sites.draw(_chosen(options), options.seed, options.count, ROOT)
    if options.list:
        report.print_drawn(drawn)
        return 0
    folder = Path(options.cache).resolve()
    warm.warm_up(ROOT, folder / "xla")
    pool = run.Pool(ROOT, folder, options.jobs)
    coverage = _coverage(pool, folder / "coverage", until)
    if coverage is None:
        print(f"The coverage map is not complete after {options.minutes:g} minutes; run it again to go on.")
        return 3
    results = run.Results(folder / "results", tree_hash(), options.seed)
    tasks = _tasks(drawn, coverage, results, options.most_minutes * 60, folder)
    complete = pool.run(tasks, until)
    report.print_table([results.of[m.name] for m in drawn if m.name in results.of], len(drawn), options.seed, began)
    if not complete and any(m.name not in results.of for m in drawn):
        return 3
    return int(report.survivors(results.of[m.name] for m in drawn) > options.allowed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seed", type=int, default=1, help="what the draw is made by")
    add("--count", type=int, default=100, help="sites to draw")
    add("--jobs", type=int, default=2, help="mutants at a time")
    add("--only", default="", metavar="FILE", help="draw from this file, or from files under this folder, only")
    add("--minutes", type=float, default=1e6, help="stop after so many, and go on in the next run")
    add("--most-minutes", type=float, default=5.0, help="of tests for one mutant; one that they do not notice has survived")
    add("--allowed", type=int, default=5, help="survivors that are no failure")
    add("--cache", default=str(ROOT / ".mutation"), help="folder of what is known")
    add("--list", action="store_true", help="print what is drawn, and run nothing")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[sites.Site]:
    chosen = [site for site in sites.all_sites(ROOT) if site.file.startswith(options.only)]
    if not chosen:
        sys.exit(f"--only {options.only}: no site lies there; name a file or folder of flax_switch/{{{','.join(sites.ROOMS)}}}.")
    return chosen


def tree_hash() -> str:
    """A hash of every file that may decide whether a mutant survives."""
    parts = [f for f in run.tracked_files(ROOT) if f.split("/")[0] in ("flax_switch", "tests", "configs", "setup.cfg")]
    return hashlib.sha256(repr([(f, coverage_map.digest(ROOT / f)) for f in sorted(parts)]).encode()).hexdigest()[:16]


def _coverage(pool: run.Pool, folder: Path, until: float) -> coverage_map.CoverageMap | None:
    folder.mkdir(parents=True, exist_ok=True)
    modules = coverage_map.module_files(ROOT)
    missing = [m for m in modules if coverage_map.load(coverage_map.file_of(folder, m), ROOT) is None]

    def task(module: str) -> run.Task:
        file = coverage_map.file_of(folder, module)

        def then(status: int, tree: Path, seconds: float) -> None:
            if status:
                sys.exit(f"{module}: no coverage (status {status}):\n{pool.log_of(tree).read_text(errors='replace')[-3000:]}")
            failing = json.loads(file.read_text())["not_passed"]
            failing = [name for name, outcome in failing.items() if outcome == "failed"]
            print(f"  {module}: {seconds:.0f} s" + (f"; left out, since they fail: {failing}" if failing else ""), flush=True)

        return run.Task(lambda tree, log: coverage_map.measure(tree, module, file), 1200, then)

    if missing:
        print(f"Measuring which line is run by which test: {len(missing)} of {len(modules)} test modules", flush=True)
        if not pool.run(map(task, missing), until):
            return None
        (folder / "complete").touch()
    return coverage_map.CoverageMap([coverage_map.load(coverage_map.file_of(folder, m), ROOT) for m in modules])


def _tasks(drawn, coverage, results: run.Results, most_seconds: float, folder: Path):
    """The tasks of the mutants that have no result yet."""
    equivalents = report.load_equivalents(EQUIVALENTS)
    judge = run.Judge(coverage, results.hints(), most_seconds, results)

    def done(result: run.Result) -> None:
        results.add(result)
        report.print_result(result, len(results.of), len(drawn))
        _forget_programs(folder)

    for mutant in drawn:
        if mutant.name in results.of:
            continue
        reason = equivalents.get(report.equivalent_key(mutant))
        covered = covering_tests(mutant.site, coverage)
        result = run.Result.of(mutant, covered=sum(map(len, covered.values())))
        if reason is not None:
            result.outcome, result.by = "equivalent", reason
        todo = judge.batches(mutant)
        if reason is not None or not todo:
            done(result)
        else:
            yield run.mutant_task(mutant, todo, result, done, judge)


def _forget_programs(folder: Path) -> None:
    """Removes what mutants compiled: nobody compiles it again, and it would grow without end."""
    mark = folder / "coverage" / "complete"
    since = mark.stat().st_mtime if mark.is_file() else 0.0
    for file in (folder / "xla").glob("*-cache"):
        if file.stat().st_mtime > since:
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
