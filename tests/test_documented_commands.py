"""What recipes, README and docs print works: every command runs for two steps on small stand-ins, every Python block too."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from documented.finding import ROOT, blocks, commands, commands_of_block, commands_of_page, python_blocks
from documented.otherwise import LIST, otherwise
from documented.python_blocks import GIVEN, PAGES, run_page
from documented.running import World, filled_in, load, run_here, small_model

from flax_switch import cli
from flax_switch.host.compilers import can_compile_for

COMMANDS = commands()
RUN = [command for command in COMMANDS if not otherwise(command.text)]
OTHERWISE = [command for command in COMMANDS if otherwise(command.text)]
PLANS = [command for command in RUN if " plan " in command.text]
DOES_NOT_FIT = ("v5p:2x4x4", "v5p:4x4x8")  # as docs/scaling.md says of these
QUICK = (  # beginnings of those that need no model
    r"flax-switch (recipes|presets|completion bash)$",
    r"python -c ",
    r"python scripts/matrix\.py constraints",
)


def named(command):
    return f"{command.where} {' '.join(command.text.split())[:90]}"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Where commands run, with a cache of its own."""
    folder = tmp_path_factory.mktemp("documented")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    yield World(folder, RUN)
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def is_quick(command):
    return any(re.match(beginning, command.text) for beginning in QUICK)


@pytest.mark.parametrize("command", [command for command in RUN if is_quick(command)], ids=named)
def test_a_documented_command_that_needs_no_model_runs(command, world):
    world.run(command)


@pytest.mark.slow  # the smoke run goes the main path
@pytest.mark.parametrize("command", [command for command in RUN if not is_quick(command)], ids=named)
def test_a_documented_command_runs(command, world):
    world.run(command, status=1 if any(topology in command.text for topology in DOES_NOT_FIT) else 0)


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=named(c), marks=pytest.mark.slow if otherwise(c.text).slow else ()) for c in OTHERWISE],
)
def test_a_command_that_cannot_run_here_is_right_as_far_as_can_be_told(command):
    otherwise(command.text).do(command.text)


@pytest.mark.parametrize("entry", LIST, ids=lambda entry: entry.beginning[:40])
def test_what_is_not_run_has_a_reason_and_is_still_printed_somewhere(entry):
    assert any(otherwise(command.text) is entry for command in OTHERWISE), f"{entry.beginning!r} begins no command: delete it"
    assert len(entry.why) > 10


def test_every_recipe_and_every_page_with_a_command_was_searched():
    places = {command.where.split(":")[0] for command in COMMANDS}
    recipes = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert all(any(f"--config {recipe} " in command.text for command in RUN) for recipe in recipes)
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    printed = {path for path in pages if re.search(r"^flax-switch ", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {path.relative_to(ROOT).as_posix() for path in printed} <= places
    assert all(any(re.match(beginning, command.text) for command in RUN) for beginning in QUICK)


PAGE = """# A page
```bash
flax-switch report runs/a     # what it says
flax-switch finetune --config a.py \\
    --init b
echo 'x' | flax-switch generate --checkpoint runs/a
```

    python -c "print(1)"
    text that is no command

```
$ flax-switch plan --config c.py
prints this
```

Say `flax-switch inspect
here` or `--config.no.command=1`.

```bash
for i in 0 1; do
  flax-switch report $i
done
```
"""


def test_commands_are_found_wherever_a_page_has_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert [command.text for command in commands_of_page(page)] == [
        "flax-switch report runs/a",
        "flax-switch finetune --config a.py --init b",
        "echo 'x' | flax-switch generate --checkpoint runs/a",
        'python -c "print(1)"',
        "flax-switch plan --config c.py",
        "for i in 0 1; do\n  flax-switch report $i\ndone",
        "flax-switch inspect here",
    ]


def test_a_line_of_a_shell_block_that_is_no_known_command_is_an_error(tmp_path):
    (tmp_path / "page.md").write_text("```bash\nflax_switch report runs/a\n```\n")
    with pytest.raises(AssertionError, match="starts with no command that this test knows"):
        list(commands_of_page(tmp_path / "page.md"))


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS, ids=named)
def test_a_documented_plan_compiles_where_there_is_a_compiler(command, world, tmp_path, monkeypatch):
    """With the topology and mesh of the command and a small model; the plan at full size needs no compiler."""
    platform = "cuda" if "h100" in command.text else "tpu"
    if not can_compile_for(platform):
        pytest.skip(f"no compiler for {platform}: pip install 'flax_switch[test-hardware]'")
    argv = filled_in(command.text).split()[1:]
    config = load(argv)
    # Every expert axis of the docs' meshes divides 128 experts; two heads suit two model ways.
    small = {**small_model(config), "num_experts": 128, "d_model": 128, "scan_layers": False, "group_size": 1024}
    changes = [f"--config.model.{name}={value}" for name, value in small.items()]
    monkeypatch.chdir(ROOT)
    argv = [word for word in argv if word != "--no-compile"]
    if "--json" in argv:
        argv[argv.index("--json") + 1] = str(tmp_path / "plan.json")
    assert cli.main([*argv, *changes, "--config.data.batch_size=1024", "--config.train.microbatches=1"]) == 0


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.where)
def test_every_python_block_compiles(block):
    compile(block.text, block.where, "exec")


QUICK_PAGES = ("README.md", "docs/finetuning.md")


@pytest.mark.parametrize("page", [pytest.param(p, marks=() if p in QUICK_PAGES else pytest.mark.slow) for p in PAGES])
def test_the_python_of_a_page_runs_as_printed(page, world, tmp_path):
    names = run_page(page, world, tmp_path)
    for losses in ("losses", "own_losses") if page == "docs/custom_training.md" else ():
        assert names[losses][-1] < 0.8 * names[losses][0], losses


def test_the_loop_of_ones_own_has_25_lines():
    loop = next(block for block in python_blocks() if block.where.startswith("docs/custom_training.md"))
    assert sum(bool(line.strip()) for line in loop.text.splitlines()) <= 25


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom_in_one_folder(world, tmp_path):
    """Commands see what earlier ones left, Python is one program; what cannot run here has its own test."""
    page = ROOT / "README.md"
    typed_lines = "\n".join(block.text for block in blocks(page))
    world.provide(tmp_path, typed_lines)
    names = {}
    with contextlib.chdir(tmp_path):
        for block in blocks(page):
            if block.language == "python":
                exec(compile(block.text, block.where, "exec"), names)
            for command in commands_of_block(block):
                if not otherwise(command.text):
                    assert run_here(filled_in(command.text)) == 0, command


def test_what_pages_are_given_is_for_pages_with_python():
    assert set(GIVEN) <= set(PAGES)
    assert "README.md" not in GIVEN


CHEAP = {
    "benchmarks/data_pipeline.py": "--seconds 0.1 --workers 0",
    "benchmarks/moe_layer.py": "--experts 2 --tokens 64 --sizes 16x32 --repeats 1",
    "benchmarks/grouped_products.py": "--experts 2 --tokens 64 --sizes 16x32 --repeats 1",
    "benchmarks/compile_time.py": "--depths 1 --repeats 1",
    "benchmarks/accelerator.py": "--toy --minutes 4 --output accelerator.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", CHEAP)
def test_a_benchmark_with_a_cheap_mode_runs(script, tmp_path):
    printed = subprocess.run(
        [sys.executable, ROOT / script, *CHEAP[script].split()], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert "|" in printed.stdout or len(printed.stdout.splitlines()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name != "run_record.py"),  # which all import
)
def test_every_benchmark_says_how_to_use_it(script):
    printed = subprocess.run([sys.executable, ROOT / "benchmarks" / script, "--help"], capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    assert "usage:" in printed.stdout
