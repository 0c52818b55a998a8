"""What recipes, README and docs print works: every command runs for two steps on small stand-ins, every Python block too."""

import os
import re




import pytest
from documented.finding import ROOT, commands, python_blocks
from documented.otherwise import LIST, otherwise
from documented.running import World, appended, filled_in, load, parse, run_in_a_shell, small_model

from flax_switch import cli
from flax_switch.compilers import can_compile_for

COMMANDS = commands()
RUN = [command for command in COMMANDS if not otherwise(command.text)]
OTHERWISE = [command for command in COMMANDS if otherwise(command.text)]
PLANS = [command for command in RUN if " plan " in command.text]
DOES_NOT_FIT = ("v5p:2x4x4", "v5p:4x4x8")  # as docs/scaling.md says of these
QUICK = (  # beginnings of those that show the parts of the command line; the rest are slow
    r"flax-switch pretrain --config configs/tiny\.py --workdir runs/tiny$",
    r"flax-switch pretrain --config configs/switch_base_8\.py ",
    r"echo 'Return the <extra_id_0> of the list\.' \| flax-switch generate --checkpoint runs/tiny$",
    r"flax-switch convert runs/tiny exported",
    r"flax-switch inspect exported",
    r"flax-switch report runs/tiny",
    r"flax-switch plan --config configs/switch_base_128\.py --topology h100:8",
    r"python -c ",
)


def named(command):
    return f"{command.where} {' '.join(command.text.split())[:90]}"


def quick_or_slow(commands):
    quick = [any(re.match(beginning, command.text) for beginning in QUICK) for command in commands]
    return [
        pytest.param(command, id=named(command), marks=() if soon else pytest.mark.slow)
        for command, soon in zip(commands, quick, strict=True)
    ]


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


@pytest.mark.parametrize("command", quick_or_slow(RUN))
def test_a_documented_command_runs(command, world):
    world.run(command, status=1 if any(topology in command.text for topology in DOES_NOT_FIT) else 0)


@pytest.mark.parametrize("command", OTHERWISE, ids=named)
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
    printed = {path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if re.search(r"^flax-switch ", path.read_text(), re.M)}
    assert {path.relative_to(ROOT).as_posix() for path in printed} <= places
    assert all(any(re.match(beginning, command.text) for command in RUN) for beginning in QUICK)
