"""The command line: flax-switch COMMAND, each a module of flax_switch.commands."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import flax_switch
from flax_switch.commands.options import hyphened, refuse, tell
from flax_switch.config import ConfigError, one_line
from flax_switch.host.memory import keep_freed_memory

# Command -> what it does; each is a module in flax_switch.commands with add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "pretrain": "pre-train a model from a recipe; run again to continue",
    "finetune": "fine-tune a checkpoint on your own tasks; run again to continue",
    "distill": "train a dense student of a sparse teacher; run again to continue",
    "evaluate": "score a checkpoint on a task's examples, by generation",
    "generate": "continue texts: text or JSON lines in, JSON lines out",
    "predict": "classify, tag, answer or embed texts with a model that has such a head",
    "serve": "serve models over HTTP, as OpenAI's clients ask for completions",
    "convert": "convert a checkpoint: Hugging Face, T5X or ours in; Hugging Face or ours out",
    "export": "write a model for another runtime: StableHLO, ONNX, CTranslate2, llama.cpp's converter",
    "upcycle": "make a mixture of experts of a dense checkpoint",
    "merge": "make a model with fewer experts, similar ones averaged by their usage",
    "prune": "make a model with fewer experts, the most used ones",
    "grow": "make a model with more experts that computes the same",
    "inspect": "say what is in a checkpoint, without loading it",
    "plan": "say what a run would need and do on a machine, without the machine",
    "report": "write the HTML report of a run, or compare several",
    "push": "put a model on the Hugging Face hub, with a model card",
    "routing": "follow the routing of a run from checkpoint to checkpoint",
    "recipes": "list the recipes that come with the package",
    "presets": "list the models of the papers, with their sizes",
    "doctor": "say what is installed and works here: versions, devices, kernels, extras, caches",
    "completion": "print a shell's completion of commands, options and fields: bash, zsh or fish",
}
TRAINING = ("pretrain", "finetune", "distill")


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with what `set_defaults(listing=...)` makes: fields and controls, which argparse does not know."""

    def error(self, message: str) -> NoReturn:
        """Says what is missing, and what it is, in a sentence of its own."""
        missing = message.partition("arguments are required: ")[2].split(", ")
        about = {"/".join(one.option_strings) or one.metavar or one.dest: one for one in self._actions}
        said = [
            f"{name}{f' {about[name].metavar}' if name.startswith('--') and about[name].metavar else ''} is missing"
            f"{f': {about[name].help}' if about[name].help else ''}."
            for name in missing
            if name in about
        ]
        tell(f"{self.prog}: {' '.join(said) or f'{message}.'} See {self.prog} --help.")
        sys.exit(2)

    def format_help(self) -> str:
        """Returns the help, wrapped at words."""
        listing = self.get_default("listing")
        return super().format_help() + (f"{listing()}\n" if listing else "")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; only the named command's module is imported, so that help and light commands start quickly."""
    parser = Parser(prog="flax-switch", description="Switch Transformers in JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"flax_switch {flax_switch.__version__}")
    parser.epilog = (
        "Begin with flax-switch pretrain --config tiny --workdir runs/tiny; flax-switch COMMAND --help says all of a command."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=description, description=description, allow_abbrev=False)
        subparser.set_defaults(parser=subparser, overrides_taken={}, listing=None)
        if name == command:
            importlib.import_module(f"flax_switch.commands.{name}").add_arguments(subparser)
    return parser


def subparser(command: str) -> argparse.ArgumentParser:
    """Returns the parser of one command."""
    return build_parser(command)._subparsers._group_actions[0].choices[command]  # pyright: ignore


def parse_known(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments of a command, and what argparse does not know: overrides, or mistakes."""
    return build_parser(argv[0] if argv and argv[0] in COMMANDS else None).parse_known_args(list(map(hyphened, argv)))


def take_rest(args: argparse.Namespace, rest: list[str]) -> Any:
    """Gives a command the overrides that it takes, and returns its module. Raises `ConfigError` for what it does not take."""
    module = importlib.import_module(f"flax_switch.commands.{args.command}")
    if hasattr(module, "take_overrides"):
        module.take_overrides(args, rest)
    elif rest:
        refuse(args, rest[0])
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors a user can mend are one message and exit status 2, without a traceback."""
    _open_streams()
    if argv is None and sys.argv[1:2] and sys.argv[1] in TRAINING:
        keep_freed_memory()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv == ["help"]:
        argv = ["--help"]
    known = ("-h", "--help", "--version") if argv[0].startswith("-") else tuple(COMMANDS)
    if argv[0] not in known:
        near = difflib.get_close_matches(argv[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        what = "option" if argv[0].startswith("-") else "command"
        tell(f"flax-switch: there is no {what} {argv[0]!r}.{hint} flax-switch --help lists them.")
        return 2
    command = ""
    try:
        try:
            args, rest = parse_known(argv)
            command = f" {args.command}"
            return take_rest(args, rest).run(args)
        finally:
            sys.stdout.flush()  # here, where it may fail: what --help prints, too
    except KeyboardInterrupt:
        print(f"flax-switch{command}: interrupted.", file=sys.stderr)
        return 130
    except (ConfigError, OSError, MemoryError, ImportError, RuntimeError) as error:
        said = _explained(error)
        if said is None:
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as shells have it of a program that SIGPIPE ended
        tell(f"flax-switch{command}: {said}")
        _drop_unprinted()
        return 2


def _open_streams() -> None:
    """Has every standard stream be there, one that was closed as an empty one, and take every text: paths need not be UTF-8."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - it lives as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _explained(error: Exception) -> str | None:
    """Returns what is said of an error that a user can mend; None for any other."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk. What was complete is kept; free some and run it again."
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror or error}."
    if isinstance(error, MemoryError):
        return f"this machine's memory is not enough ({error or 'of the host'})."
    text = one_line(error)
    if "pip install" in text or text.startswith("Unable to initialize backend"):  # an extra, or JAX_PLATFORMS without its device
        return f"{text}."
    return f"a device's memory is not enough ({text})." if "RESOURCE_EXHAUSTED" in text else None


def _nobody_reads() -> bool:
    """Returns whether standard output is a pipe whose reader is gone, as in `| head`; what is left to print then goes nowhere."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    pipe = select.poll()
    pipe.register(1, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if gone:
        _drop_unprinted()
    return gone


def _drop_unprinted() -> None:
    """Lets go of what standard output does not take, on a full disk for instance, for Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
