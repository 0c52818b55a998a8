"""Runs documented commands for two steps on stand-ins, each in a folder of its own."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from documented.finding import ROOT, Command
from documented.stand_ins import FILES, PIECES, VOCAB_SIZE, Store, place
from flax_switch import cli
from flax_switch.commands import options
from flax_switch.config.finetuning import FinetuneRecipe

# What a reader would put in the place of a word in capitals.
PLACEHOLDERS = {
    "CHECKPOINT": "runs/tiny",
    "WORKDIR": "runs/tiny",
    "RUN": "runs/tiny",
    "SRC": "runs/tiny",
    "DENSE": "google-t5/t5-base",
    "DST": "made",
    "DIR": "runs/made",
    "gs://BUCKET/": "runs/",
}
ALIASES = {"runs/mine": "runs/tiny"}  # a run of the reader's own -> one that a documented command makes
_LINKED = ("configs", "scripts", "benchmarks", "flax_switch")
_OUTPUT_OPTIONS = ("workdir", "output", "json", "plot", "destination")
LARGE = 256  # d_model from which a recipe is one of more than 100 M parameters
_MAKES_A_SMALL_MODEL = dict(
    d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=2, num_decoder_layers=1, num_experts=8, group_size=32,
    vocab_size=VOCAB_SIZE,
)  # fmt: skip


def filled_in(text: str) -> str:
    """A command with brackets around optional arguments taken off and words in capitals replaced."""
    text = re.sub(r"\[(--[^\]]*?)(?: \.\.\.)?\]", r"\1", text)
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w/]){re.escape(name)}" + ("" if name.endswith("/") else r"(?!\w)"), value, text)
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a flax-switch command, by its own parser; its overrides are sorted, too."""
    args, rest = cli.parse_known(argv)
    cli.take_rest(args, rest)
    return args


def load(argv: list[str]):
    """The config of a command that names a recipe, or None."""
    args = parse(argv)
    return options.load_any(args) if getattr(args, "config", None) or getattr(args, "gin_file", None) else None


def outputs(argv: list[str]) -> set[str]:
    """The paths that a command writes."""
    args = vars(parse(argv))
    names = _OUTPUT_OPTIONS if argv[0] != "report" else ()  # a report goes into the run that it is about
    return {str(args[name]) for name in names if args.get(name)}


def appended(argv: list[str]) -> list[str]:
    """What the test adds to a command: two steps, small batches, and small sizes where the recipe is of a large model."""
    if argv[0] == "generate":
        return ["--max-new-tokens", "4"]
    if argv[0] == "plan":
        return [] if "--no-compile" in argv else ["--no-compile"]
    if argv[0] == "evaluate":
        return [f"--config.{name}={value}" for name, value in _EVALUATION.items()]
    config = load(argv)
    if config is None:
        return []
    small = _finetuning(config) if isinstance(config, FinetuneRecipe) else _pretraining(config)
    prefix = "--gin." if "--gin-file" in argv else "--config."
    return [f"{prefix}{name}={value!r}" for name, value in small.items()]


_STEPS = {f"train.{name}": 2 for name in ("steps", "eval_every", "checkpoint_every")} | {
    f"train.{name}": 1 for name in ("log_every", "eval_batches", "sample_spans", "microbatches")
}
_EVALUATION = {"evaluation.max_examples": 2, "evaluation.batch_size": 2, "data.targets_length": 8}


def _pretraining(config) -> dict[str, object]:
    changed: dict[str, object] = {**_STEPS, "data.batch_size": 16, "data.inputs_length": 32, "data.targets_length": 16}
    if config.data.source == "default" and not config.data.mixture:
        changed |= {"data.source": "text.txt", "data.heldout_fraction": 0.2}  # enough to look at routing
    if config.data.vocabulary is None:
        changed["data.vocabulary_size"] = PIECES
    if config.model.d_model > LARGE:
        changed["train.sample_spans"] = 0
        changed |= {f"model.{name}": value for name, value in small_model(config).items()}
        changed |= {f"mesh.{axis}": min(getattr(config.mesh, axis), most) for axis, most in (("expert", 4), ("model", 2))}
    return changed


def small_model(config) -> dict[str, int]:
    """Sizes of a small model with the recipe's kinds of layers."""
    model = config.model
    every = model.num_encoder_layers == model.num_sparse_encoder_layers
    encoder, decoder = (min(1, number) for number in (model.num_sparse_encoder_layers, model.num_sparse_decoder_layers))
    return {
        **_MAKES_A_SMALL_MODEL,
        "num_sparse_encoder_layers": 2 if every else encoder,
        "num_sparse_decoder_layers": decoder,
    }


def _finetuning(config: FinetuneRecipe) -> dict[str, object]:
    length = 32 if config.data.context is None else 128  # a question and the context that has its answer
    rows = {"data.batch_tokens": 8 * length} if config.data.batch_tokens else {"data.batch_size": 8}
    return {**_STEPS, **rows, **_EVALUATION, "data.inputs_length": length}


class World:
    """Where documented commands run: a folder for each, with the stand-ins and results of other commands that it names."""

    def __init__(self, folder: Path, commands: list[Command]):
        self.folder = folder
        self.store = Store(folder / "stand-ins")
        self.done: dict[str, Path] = {}  # a command's text -> where it ran
        self.makers: dict[str, Command] = {}  # a path -> the first command that writes it
        for command in commands:
            argv = _only_command(filled_in(command.text))
            if argv and argv[0] != "plan" and len(argv) > 1:
                for path in outputs(argv):
                    self.makers.setdefault(path, command)

    def run(self, command: Command, status: int = 0) -> Path:
        """The folder in which a command has run with the exit status; a command runs once a session."""
        if command.text not in self.done:
            folder = self.folder / f"run-{len(self.done)}"
            folder.mkdir(parents=True)
            self.done[command.text] = folder
            text = filled_in(command.text)
            self.provide(folder, text)
            with contextlib.chdir(folder):
                found = run_here(text)
            assert found == status, f"{command.where}: {command.text} ended with status {found}"
        return self.done[command.text]

    def provide(self, folder: Path, text: str) -> None:
        """Puts what a text names into a folder."""
        for name in _LINKED:
            (folder / name).symlink_to(ROOT / name)
        calls = commands_of(text)
        written = set().union(*(outputs(argv) for argv in calls))
        for path in sorted({"text.txt", *re.findall(r"[\w.*/-]+", text), *itertools.chain(*map(_sources, calls))}):
            if not any(path == made or path.startswith(f"{made}/") for made in written):
                self._provide_path(folder, path)

    def _provide_path(self, folder: Path, path: str) -> None:
        parts = path.split("/")
        for length in range(len(parts), 0, -1):
            name = "/".join(parts[:length])
            if name in FILES:
                return self.store.copy(name, folder)
            if ALIASES.get(name, name) in self.makers:
                made = self.run(self.makers[ALIASES.get(name, name)]) / ALIASES.get(name, name)
                return place(made, folder / name)
        return None


def _sources(argv: list[str]) -> list[str]:
    """The files that a command's recipe names as its text."""
    sources = getattr(getattr(load(argv), "data", None), "sources", ())
    return [source.source for source in sources if isinstance(source.source, str)]


def commands_of(text: str) -> list[list[str]]:
    """The arguments of every flax-switch command in a line or a script, whatever is around them."""
    if only := _only_command(text):
        return [only]
    text = re.sub(r"\\\n\s*", " ", re.sub(r"[ \t]+# .*$", "", text, flags=re.MULTILINE))
    found = re.findall(r"flax-switch ([a-z][^|&\"`;\n]*)", re.sub(r"\n {2,}(?=--)", " ", text))
    found += re.findall(r"python -m flax_switch\.cli ([a-z][^|&;\n]*)", text)
    found += [f"{name} {rest}" for name, rest in re.findall(r"python scripts/(pretrain|finetune)\.py ([^|&;\n]*)", text)]
    return [shlex.split(part) for part in found]


def run_here(text: str) -> int:
    """The exit status of a command that runs in the current folder, for two steps."""
    argv = _only_command(text)
    with typed("Return the <extra_id_0> of the list.\n"):
        return cli.main([*argv, *appended(argv)]) if argv else run_in_a_shell(text)


@contextlib.contextmanager
def typed(text: str) -> Iterator[None]:
    """Standard input is a text; commands that read none do not see it."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before


def _only_command(text: str) -> list[str]:
    """The arguments of a line that is one flax-switch command, which this process can run; else none."""
    return shlex.split(text)[1:] if text.startswith("flax-switch ") and "\n" not in text else []


def run_in_a_shell(text: str) -> int:
    """Runs a line or a script by bash, with `flax-switch` and `python` those of this checkout, and two steps."""
    folder = Path.cwd() / ".bin"
    folder.mkdir(exist_ok=True)
    for name, start in (("flax-switch", f"{sys.executable} -m flax_switch.cli"), ("python", sys.executable)):
        (folder / name).write_text(f'#!/bin/sh\nexec {start} "$@" $APPENDED\n')
        (folder / name).chmod(0o755)
    added = [appended(argv) for argv in commands_of(text)]
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "APPENDED": " ".join(added[0]) if added else "",
    }
    result = subprocess.run(["bash", "-c", f"set -e\n{text}\nwait"], env=environment, capture_output=True, text=True, timeout=300)
    print(result.stdout, result.stderr, sep="\n")
    return result.returncode
