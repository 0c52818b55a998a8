"""The mutation run's own laws: what is a site, what it becomes, that draws are fair and repeatable, and who must notice."""

import ast
import functools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from mutation import (  # noqa: E402 - scripts are no package
    plan,  # noqa: E402
    report,
    run,
    sites,
)
from mutation.coverage_map import CoverageMap  # noqa: E402
from mutation.operators import OPERATORS  # noqa: E402
from mutation.plan import batches, covering_tests  # noqa: E402

FILE = "flax_switch/ops/example.py"


@functools.cache
def every_site() -> list[sites.Site]:
    """The sites of the package as it is."""
    return sites.all_sites(ROOT)


def becomes(source: str, operator: str) -> set[str]:
    """Every line that the operator can make of the source's last line."""
    found = set()
    for site in sites.sites_of(FILE, source):
        for new in site.replacements if site.operator == operator else ():
            after = source[: site.start] + new + source[site.end :]
            found.add(ast.unparse(ast.parse(after)).splitlines()[-1].strip())
    return found


@pytest.mark.parametrize(
    ("operator", "source", "changed"),
    [
        ("comparison", "a < b <= c", {"a <= b <= c", "a < b < c"}),
        ("comparison", "a is not b", {"a is b"}),
        ("sign", "a - b", {"a + b"}),
        ("sign", "f(-a)", {"f(a)"}),
        ("sign", "a += b", {"a -= b"}),
        ("sign", "'a' + b", set()),
        ("off by one", "x[1]", {"x[2]", "x[0]"}),
        ("off by one", "x[-1]", {"x[0]"}),
        ("dropped term", "a + b * c", {"a", "b * c", "a + b", "a + c"}),
        ("dropped term", "a / b", {"a"}),
        ("dropped term", "a and b or c", {"a and b", "c", "a or c", "b or c"}),
        ("dropped call", "import jnp\ny = jnp.exp(x, 1)", {"y = x"}),
        ("dropped call", "y = x.sum(1)", {"y = x"}),
        ("dropped call", "y = self.norm(x)", {"y = x"}),
        ("dropped call", "items.append(x)", {"pass", "items"}),
        ("axis", "x.sum(-1)", {"x.sum(-2)"}),
        ("axis", "jnp.stack(x, axis=0)", {"jnp.stack(x, axis=1)"}),
        ("axis", "x.sum(axis=(0, 1))", {"x.sum(axis=(0,))", "x.sum(axis=(1, 1))", "x.sum(axis=(0, 0))"}),
        ("dtype", "x.astype(jnp.float32)", {"x", "x.astype(jnp.bfloat16)"}),
        ("dtype", "f(x, dtype=d)", {"f(x)"}),
        ("default", "def f(a=True, b=2, *, c=0.5): pass", {"pass"}),
        ("swapped arguments", "f(a, b, c)", {"f(b, a, c)", "f(a, c, b)"}),
        ("swapped arguments", "jnp.maximum(a, b)", set()),
        ("removed stop_gradient", "import jax\ny = jax.lax.stop_gradient(x) + x", {"y = x + x"}),
    ],
)
def test_an_operator_makes_what_it_says(operator, source, changed):
    assert operator in OPERATORS
    assert becomes(source, operator) == changed


def test_defaults_of_functions_and_fields_are_changed_and_are_no_other_operators_site():
    source = "class A:\n    size: int = 3\n\ndef f(a=True, *, b=0.0):\n    return a"
    found = {(s.operator, source[s.start : s.end], s.replacements) for s in sites.sites_of(FILE, source)}
    assert found == {("default", "3", ("4",)), ("default", "True", ("False",)), ("default", "0.0", ("1.0",))}


@pytest.mark.parametrize(
    "source",
    [
        'def f(x: Float[Array, "2 3"]) -> tuple[int, 1]:\n    """Adds 1 + 1."""',
        "raise ValueError(f(1 + 2, 'a' < b))",
        "print(1 + x, f(x))",
        "logging.info('%d', x - 1)",
        "message = f'{x + 1}'",
        "__all__ = [a + b]",
        "import a.b",
    ],
)
def test_annotations_docstrings_and_what_is_told_to_people_are_no_sites(source):
    assert not sites.sites_of(FILE, source)


def test_characters_of_several_bytes_do_not_move_what_is_changed():
    source = "y = 'é' if a < b else 'ü'"
    (site,) = sites.sites_of(FILE, source)
    assert source[site.start : site.end] == "a < b"


def test_a_draw_repeats_is_another_for_another_seed_and_hardly_moves_where_other_code_changes():
    drawn = every_site()
    first, second = sites.draw(drawn, 1, 40, ROOT), sites.draw(drawn[::-1], 1, 40, ROOT)
    assert [m.name for m in first] == [m.name for m in second]
    other = sites.draw(drawn, 2, 40, ROOT)
    assert len({m.name for m in first} & {m.name for m in other}) < 5
    fewer = [s for s in drawn if not s.file.endswith("ops/losses.py")]
    kept = sites.draw(fewer, 1, 40, ROOT)
    assert {m.name for m in first if not m.site.file.endswith("ops/losses.py")} <= {m.name for m in kept}


def test_every_mutant_compiles_and_differs_from_the_code():
    for mutant in sites.draw(every_site(), 3, 50, ROOT):
        assert ast.dump(ast.parse(mutant.after)) != ast.dump(ast.parse(mutant.before))
        assert mutant.was != mutant.becomes


def test_every_equivalent_mutant_is_one_that_can_be_drawn_and_says_why():
    entries = report.load_equivalents(ROOT / "scripts" / "mutation_equivalents.json")
    sources = {file: (ROOT / file).read_text("utf-8") for file, *_ in entries}
    possible = set()
    for file, source in sources.items():
        for site in sites.sites_of(file, source):
            for new in site.replacements:
                mutant = sites.Mutant(site, new, source, source[: site.start] + new + source[site.end :])
                possible.add(report.equivalent_key(mutant))
    assert not set(entries) - possible, "these lines are not in the code as it is"


SOURCE = "SIZE = 4\n\ndef f(x=1):\n    y = x + SIZE\n    return y + 1"


def coverage_map(lines):
    """Two modules: the first has a test that runs lines 4 and 5, and a slower one that runs nothing of the file."""
    near, far = "tests/ops/test_example.py", "tests/data/test_other.py"
    of_near = [[f"{near}::test_a", 1.0], [f"{near}::test_b", 3.0]]
    contents = [
        {"module": near, "tests": of_near, "not_passed": {}, "sets": [[0], [-1]], "lines": {FILE: lines}},
        {"module": far, "tests": [[f"{far}::test_c", 0.1]], "not_passed": {}, "sets": [[0]], "lines": {FILE: {"5": 0}}},
    ]
    return CoverageMap(json.loads(json.dumps(contents)))


def site_at(line):
    return next(s for s in sites.sites_of(FILE, SOURCE) if s.line == line)


def test_who_runs_the_line_must_notice_and_what_runs_at_import_belongs_to_the_functions():
    coverage = coverage_map({"1": 1, "3": 1, "4": 0, "5": 0})
    inside = covering_tests(site_at(4), coverage)
    assert inside == {"tests/ops/test_example.py": ["tests/ops/test_example.py::test_a"]}
    for line in (1, 3):
        assert set(covering_tests(site_at(line), coverage)) == {"tests/ops/test_example.py", "tests/data/test_other.py"}


def test_a_default_belongs_to_its_function_although_a_test_may_import_the_file():
    found = covering_tests(site_at(3), coverage_map({"1": 0, "3": 0}))
    assert found == {"tests/data/test_other.py": ["tests/data/test_other.py::test_c"]}  # it alone runs the body


def test_the_module_of_the_files_name_is_asked_though_no_line_is_run_in_its_process():
    own = {"module": plan.namesake(FILE), "tests": [["own::test", 0.1]], "not_passed": {}, "sets": [], "lines": {}}
    coverage = CoverageMap([*coverage_map({"4": 0}).modules.values(), own])
    assert plan.namesake("flax_switch/host/memory.py") == "tests/host/test_memory.py"
    assert "own::test" in batches(site_at(4), coverage, None, 100.0)[0].tests[own["module"]]


def test_a_function_that_runs_at_import_is_judged_by_all_that_import_it_then():
    near, far = "tests/ops/test_example.py", "tests/data/test_other.py"
    found = covering_tests(site_at(5), coverage_map({"1": 1, "4": 1, "5": 1}))
    assert found == {near: [f"{near}::test_a", f"{near}::test_b"], far: [f"{far}::test_c"]}


def test_the_nearest_tests_run_first_and_the_rest_of_their_modules_last():
    coverage = coverage_map({"4": 0, "5": 0})
    (only,) = batches(site_at(5), coverage, None, 100.0)
    near, far = "tests/ops/test_example.py", "tests/data/test_other.py"
    assert only.tests == {near: [f"{near}::test_a", f"{near}::test_b"], far: [f"{far}::test_c"]}
    hinted = batches(site_at(5), coverage, f"{far}::test_c", 100.0)
    assert hinted[0].tests == {far: [f"{far}::test_c"]} and len(hinted) == 2
    (short,) = batches(site_at(5), coverage, None, 0.5)
    assert short.tests == {near: [f"{near}::test_a"]}


@pytest.mark.parametrize("failed", ["", "tests/ops/test_example.py::test_a"])
def test_what_is_left_behind_after_a_failure_does_not_hide_it(failed, tmp_path):
    (tmp_path / "0.told").write_text(json.dumps({"ran": 3, "failed": failed}))
    assert run._verdict(0, tmp_path / "0.log") == {"killed": bool(failed), "by": failed, "ran": 3}


def test_a_test_is_believed_only_once_it_passed_on_the_unchanged_tree(tmp_path):
    coverage = coverage_map({"4": 0, "5": 0})
    judge = run.Judge(coverage, {}, 100.0, run.Results(tmp_path, "tree", 1))
    mutant = sites.mutant_of(site_at(5), 1, SOURCE)
    near, far = "tests/ops/test_example.py", "tests/data/test_other.py"
    assert not judge.believes(f"{near}::test_a") and judge.believes("time limit")
    together = batches(site_at(5), coverage, None, 100.0)[0]
    assert judge.control(f"{near}::test_b", together).tests == {near: [f"{near}::test_b"]}
    assert judge.control(near, together).tests == {near: [f"{near}::test_a"], far: [f"{far}::test_c"]}  # what was imported at once
    judge.settle(f"{near}::test_a", passed=True)
    judge.settle(f"{far}::test_c", passed=False)
    assert judge.believes(f"{near}::test_a") and not judge.believes(f"{far}::test_c")
    assert [batch.tests for batch in judge.batches(mutant)] == [{near: [f"{near}::test_a", f"{near}::test_b"]}]
    judge.settle(near, passed=False)
    assert judge.batches(mutant) == []


def test_a_mutant_whose_killer_fails_anyway_meets_the_other_tests(tmp_path):
    """With what children would have told, in place of children."""
    coverage = coverage_map({"4": 0, "5": 0})
    judge = run.Judge(coverage, {}, 100.0, run.Results(tmp_path, "tree", 1))
    mutant = sites.mutant_of(site_at(5), 1, SOURCE)
    tree, told, near = tmp_path / "0", tmp_path / "0.told", "tests/ops/test_example.py"
    (tree / mutant.site.file).parent.mkdir(parents=True)
    finished = []
    task = run.mutant_task(mutant, judge.batches(mutant), run.Result.of(mutant), finished.append, judge)
    for failing, status in ((f"{near}::test_a", 1), (f"{near}::test_a", 1), (f"{near}::test_b", 1), ("", 0)):
        told.write_text(json.dumps({"ran": 1, "failed": failing}))
        task = task.then(status, tree, 1.0)
        assert (tree / mutant.site.file).read_text() == SOURCE or not failing
    assert task is None and [(r.outcome, r.by) for r in finished] == [("killed", f"{near}::test_b")]


def test_a_line_that_no_test_runs_has_no_tests():
    coverage = CoverageMap([])
    assert batches(site_at(4), coverage, None, 100.0) == []
