"""Commands that are not run as they stand: what is done with each instead, and why. Nothing else may be left out."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from documented.finding import ROOT
from documented.running import commands_of, filled_in, load, parse
from flax_switch import cli


class Otherwise(NamedTuple):
    """Commands whose text begins so (a regular expression), what is done instead, and why."""

    beginning: str
    do: Callable[[str], None]
    why: str
    slow: bool = False


def parsed(text: str) -> None:
    """Every flax-switch command in it is understood by its own parser, and its recipe loads with the overrides."""
    found = commands_of(filled_in(text.replace("$i", "0")))
    assert found, f"there is no flax-switch command in {text!r}"
    for argv in found:
        assert load(argv) is not None


def launches(text: str) -> None:
    """What follows a launch file that there is, and its own options, is a command with a recipe."""
    words = shlex.split(text)
    assert (ROOT / next(word for word in words if word.startswith("scripts/launch/"))).exists()
    assert load(words[next(i for i, word in enumerate(words) if word in cli.COMMANDS) :]) is not None


def names_a_command(text: str) -> None:
    """A command by its name alone, or with an ellipsis for all else."""
    assert re.search(r"flax-switch (\S+)", text)[1] in cli.COMMANDS


def is_understood(text: str) -> None:
    """The command's own parser takes it."""
    (argv,) = commands_of(filled_in(text))
    assert parse(argv).command == argv[0]


def asks_what_is_served(text: str) -> None:
    """The request has a path of the server, and fields that it takes."""
    from flax_switch.serving.completions import FIELDS

    words = shlex.split(text)
    assert any(word.endswith("/v1/completions") for word in words)
    assert set(json.loads(words[words.index("-d") + 1])) <= set(FIELDS)


def names_extras(text: str) -> None:
    """The extras of an installation are those that setup.cfg has."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = re.search(r"(?:flax_switch|-e '\.|\.whl\))\[([\w,]+)\]|EXTRAS=([\w,]+)", text)
    assert named, text
    assert set((named[1] or named[2]).split(",")) <= set(settings["options.extras_require"])


def says_how_to_use_it(text: str) -> None:
    """The script is there and knows the options that are used."""
    script, *rest = text.removeprefix("python ").split()
    printed = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert printed.returncode == 0, printed.stderr
    for option in (word.split("=")[0] for word in rest if word.startswith("--")):
        assert option in printed.stdout, f"{script} has no option {option}"


def is_shell(text: str) -> None:
    """The script is there, and the shell can read it."""
    subprocess.run(["bash", "-n", *text.split()[1:]], check=True, cwd=ROOT)


def is_a_line_of_shell(text: str) -> None:
    """A line that the shell can read, about other projects' programs."""
    subprocess.run(["bash", "-n", "-c", text], check=True)


LIST = [
    Otherwise(r"bash scripts/(quickstart|test)\.sh", is_shell, "installs packages, and is what runs this test"),
    Otherwise(
        r"pip install ('jax\[k8s\]'|'jax<0\.11'|ray$|build$)",
        is_a_line_of_shell,
        "needs a package index, for another project's package",
    ),
    Otherwise(r"python convert_hf_to_gguf\.py ", is_a_line_of_shell, "a script of another project, which docs/export.md names"),
    Otherwise(r"python -m build", is_a_line_of_shell, "needs a package index; the wheel has a test of its own"),
    Otherwise(r"docker build ", names_extras, "needs Docker and a network"),
    Otherwise(r"docker push ", is_a_line_of_shell, "needs Docker and a registry"),
    Otherwise(r"git ", is_a_line_of_shell, "needs the repository's history"),
    Otherwise(r"pip install ", names_extras, "needs a package index"),
    Otherwise(r"python scripts/data/debian_descriptions\.py", says_how_to_use_it, "asks apt; tests/scripts runs it on small files"),
    Otherwise(
        r"python scripts/data/source_code\.py", says_how_to_use_it, "reads all packages; tests/scripts runs it on small files"
    ),
    Otherwise(
        r"python benchmarks/", says_how_to_use_it, "takes minutes; those with a cheap mode are run by it in another test", slow=True
    ),
    Otherwise(r"python scripts/first_hour\.py", says_how_to_use_it, "builds a wheel and a fresh environment for it"),
    Otherwise(
        r"python scripts/(kill_table|full_disk)\.py", says_how_to_use_it, "takes an hour; tests/training/test_kills does the same"
    ),
    Otherwise(
        r"flax-switch (pretrain|finetune|distill|evaluate|generate|convert|inspect|plan|serve|predict)$",
        names_a_command,
        "a mention of the command, no call of it",
    ),
    Otherwise(
        r"flax-switch plan (--save-program|--topology '2\*v5e:4x4')$", names_a_command, "a mention of an option, no call of it"
    ),
    Otherwise(r"flax-switch (plan|pretrain) .* --(save-)?program ", parsed, "tests/training/test_saved_program does both"),
    Otherwise(r"mpirun .* flax-switch pretrain \.\.\. ", names_a_command, "needs a cluster, and leaves out what others say"),
    Otherwise(
        r"flax-switch \w+ --gin[-_]file configs/gin/\w+\.gin .*\[--gin", parsed, "tests/test_recipes: it is the recipe's run"
    ),
    Otherwise(r"flax-switch pretrain .* --workdir gs://bucket/.* --distributed", parsed, "needs a cluster and a cloud"),
    Otherwise(r"flax-switch serve ", is_understood, "serves until it is told to end; tests/serve does"),
    Otherwise(r"curl ", asks_what_is_served, "needs a server; tests/serve has one"),
    Otherwise(r"gcloud ", parsed, "needs a cloud"),
    Otherwise(
        r"(bash|sbatch .*|python) scripts/launch/", launches, "needs hosts or a cluster; tests/scripts/test_launch has stand-ins"
    ),
    Otherwise(r"kubectl apply -f scripts/launch/jobset\.yaml$", is_a_line_of_shell, "needs a cluster"),
]


def otherwise(text: str) -> Otherwise | None:
    """The list's first entry for a command, if there is one."""
    return next((entry for entry in LIST if re.match(entry.beginning, text)), None)
