"""Command lines by a grammar: each has one thing at least that cannot be, so none begins to compute."""

import argparse
import contextlib
import io
import random
import sys
from pathlib import Path

from flax_switch.cli import COMMANDS, build_parser, main
from tests.fuzz.case import Reader
from tests.fuzz.readers.data import TEXTS
from tests.fuzz.readers.models import _huggingface
from tests.fuzz.readers.settings import FIELDS, SHIPPED, words

# What makes a command end before it computes.
WRONG = {
    "pretrain": (["--workdir", "{file}"], ["--config", "absent"], ["--config.train.steps=0"], ["--gin-file", "{file}"]),
    "finetune": (["--workdir", "{file}"], ["--init", "{file}"], ["--init", "{absent}"], ["--config.data.train={absent}"]),
    "distill": (["--workdir", "{file}"], ["--teacher", "{file}"], ["--teacher", "{absent}"], ["--config.mesh.data=0"]),
    "evaluate": (["--checkpoint", "{absent}"], ["--output", "{file}"], ["--config.data.validation={absent}"]),
    "generate": (["--input", "{absent}"], ["--output", "{folder}"], ["--output", "{absent}/x"], ["--num-beams", "0"], ["--x"]),
    "predict": (["--input", "{absent}"], ["--output", "{folder}"], ["--batch-size", "0"], ["--x"]),
    "convert": (["--to", "x"], ["--dtype", "int8"], ["--max-shard-size", "x"], ["--set", "x"], ["--expert-capacity", "0"]),
    "export": (["--to", "x"], ["--set", "x"], ["--platform", "x", "--to", "stablehlo"], ["--x"]),
    "merge": (["--keep", "x"], ["--num-experts", "-1"], ["--seed", "-1"], ["--batches", "0"], ["--batch-size", "0"], ["--to", "x"]),
    "prune": (["--length", "0"], ["--num-experts", "0"], ["--examples", "x"], ["--to", "x"]),
    "grow": (["--num-experts", "3"], ["--router-noise", "nan"], ["--seed", "-1"], ["--to", "x"]),
    "upcycle": (["--layout", "x"], ["--noise", "nan"], ["--num-experts", "-1"], ["--seed", "-1"], ["--to", "x"]),
    "inspect": (["--plot", "{folder}"], ["--set", "d_model=x"], ["--target", "a"], ["--x"]),
    "plan": (["--topology", "x:1"], ["--mesh", "data=0"], ["--json", "{folder}"], ["--json", "{absent}/x"], ["--effort", "x"]),
    "report": (["{absent}"], ["{folder}"], ["--output", "{folder}"]),
    "push": (["{absent}", "a/b", "--dry-run"], ["{folder}", "x", "--dry-run"], ["{folder}", "a/b", "--dtype", "int3", "--dry-run"]),
    "serve": (["{absent}"], ["--x"]),  # whatever stands beside these, it does not begin to serve
    "routing": (["{absent}"], ["{folder}"], ["--x"]),
    "recipes": (["absent"], ["--x"]),
    "presets": (["absent"], ["--x"]),
    "doctor": (["absent"], ["--x"]),
    "completion": (["absent"], ["--x"]),
}


def _make(folder: Path) -> None:
    _huggingface(folder / "model")
    (folder / "file").write_text("\n".join(TEXTS))
    (folder / "folder").mkdir()


def command_line(rng: random.Random, place: Path) -> list[str]:
    """Draws a command line."""
    command = rng.choice(list(COMMANDS))
    paths = [str(place / name) for name in ("model", "file", "folder", "absent", "absent/deeper", "model/config.json")]
    named = {name: str(place / name) for name in ("file", "folder", "absent")}
    parts = []
    if command in ("pretrain", "finetune", "distill", "evaluate", "plan"):
        parts.append(["--config", rng.choice(SHIPPED)])
    for action in _actions(command):
        value = rng.choice((*paths, *paths, *SHIPPED, "h100:8", "cpu:2", words(rng)))
        value = value if action.type not in (int, float) or rng.random() < 0.2 else str(rng.randint(-2, 9))
        if not action.option_strings or action.required or rng.random() < 0.15:
            flag = action.option_strings[-1:] or []
            parts.append(flag if action.nargs == 0 else [f"{flag[0]}={value}"] if flag and rng.random() < 0.3 else [*flag, value])
    for _ in range(rng.choice((0, 0, 1, 2))):
        parts.append([f"--{rng.choice(('config', 'config', 'gin'))}.{rng.choice(FIELDS)}={words(rng)}"])
    parts.append([part.format(**named) for part in rng.choice(WRONG[command])])
    rng.shuffle(parts)
    if command == "plan":
        parts.append(["--no-compile"])
    if rng.random() < 0.03:
        command = rng.choice(("", "pretrian", "-", "--x", "\x00"))
    return [command, *(argument for part in parts for argument in part)]


def _actions(command: str) -> list[argparse.Action]:
    (choices,) = (action.choices for action in build_parser(command)._actions if isinstance(action, argparse._SubParsersAction))
    actions = choices[command]._actions
    return [action for action in actions if "--distributed" not in action.option_strings and action.dest != "help"]


def _run(place: Path, rng: random.Random) -> None:
    arguments, said = command_line(rng, place), io.StringIO()
    print(f"  {arguments}", file=sys.stderr)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(arguments)
    except SystemExit as ended:  # argparse's
        status = ended.code
    assert status in (1, 2), (status, arguments)
    assert said.getvalue().strip(), f"nothing is said about {arguments}"
    assert "Traceback" not in said.getvalue()


READERS = {"command-lines": Reader(_make, _run, ())}
