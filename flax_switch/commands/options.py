"""Options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flax_switch.config import ConfigError, MeshConfig, SwitchConfig, check, one_of, shipped
from flax_switch.config.kinds import RECIPES, Recipe

if TYPE_CHECKING:
    from flax_switch.parallel.processes import Connection


def add_recipe_arguments(parser: argparse.ArgumentParser, kind: str, without: str | None = None) -> None:
    """Adds --config and --gin-file, and declares what they may change: the fields of a recipe of the kind, one section left out."""
    parser.add_argument(
        "--config", metavar="RECIPE", help="one by name, such as tiny (flax-switch recipes lists them), or a file of your own"
    )
    parser.add_argument(
        "--gin-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a gin file that names a recipe and changes it; or such a name",
    )
    found = {field.name: field.default_factory for field in dataclasses.fields(RECIPES[kind]) if field.name != without}
    sections = {name: SwitchConfig if section is dict else section for name, section in found.items() if isinstance(section, type)}
    overrides = {hyphened(f"--{f.name}"): f"--config.{s}.{f.name}" for s in sections for f in dataclasses.fields(sections[s])}
    flags = {f"{s}.{f.name}" for s in sections for f in dataclasses.fields(sections[s]) if f.type in ("bool", bool)}
    parser.set_defaults(kind=kind, sections=tuple(sections), overrides_taken=overrides, flags=flags)
    parser.set_defaults(listing=lambda: _listing(sections))
    parser.epilog = (
        "Any field below can be set: --config.SECTION.FIELD=VALUE with --config, --gin.SECTION.FIELD=VALUE with --gin-file. A "
        "field that is true or false needs no =true. Defaults are the library's; --print-config shows those of a recipe."
    )


def _listing(sections: dict[str, Any]) -> str:
    from flax_switch.commands.fields import described, listing

    return "\n".join(
        listing(f"fields of {name}", described(section), f"--config.{name}.{{name}}") for name, section in sections.items()
    )


def add_compile_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --no-compile-cache, for `start_jax`."""
    parser.add_argument("--no-compile-cache", action="store_true", help="compile all programs anew, and keep none")


def start_jax(args: argparse.Namespace) -> None:
    """Imports JAX with the cache of compiled programs; call it when everything that can be checked without JAX is."""
    from flax_switch.host.compile_cache import use_compile_cache

    use_compile_cache(off=args.no_compile_cache or getattr(args, "dry_run", False))  # a dry run leaves nothing behind


def tell(text: str) -> None:
    """Prints a message on standard error; on a terminal its lines end at words."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        options: Any = dict(break_long_words=False, break_on_hyphens=False)
        text = "\n".join(textwrap.fill(line, width, **options) for line in text.splitlines())
    print(text, file=sys.stderr)


def show(path: object) -> None:
    """Shows a page in the browser that the system has; where it has none, nothing happens."""
    import webbrowser

    webbrowser.open(Path(str(path)).absolute().as_uri())


def hyphened(argument: str) -> str:
    """Returns an argument with hyphens in its option's name, in which underscores do as well; names of fields stay as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and "." not in name else argument


def take_overrides(args: argparse.Namespace, rest: list[str]) -> None:
    """Sorts what argparse did not know into args.overrides and args.bindings; what the command does not take is an error."""
    args.overrides, args.bindings = [], []
    rest = list(rest)
    while rest:
        name, equals, value = rest[0].partition("=")
        option, _, field = name.partition(".")
        place = {"--config": args.overrides, "--gin": args.bindings}.get(option)
        if place is None:
            refuse(args, rest[0])
        meant = args.overrides_taken.get(hyphened(f"--{field}"), "").replace("--config", option)
        check(not meant, f"{name} lacks the field's section; did you mean {meant}?")
        one_of(f"The section of {name}", field.partition(".")[0], (*args.sections, *(["recipe"] if option == "--gin" else [])))
        rest.pop(0)
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if not equals and field in args.flags:
            equals, value = "=", "true"
        place.append(f"{field}{equals}{value}")


def refuse(args: argparse.Namespace, argument: str) -> NoReturn:
    """Raises `ConfigError` for an argument that the command does not take, with the nearest that it takes."""
    taken = {name: name for action in args.parser._actions for name in action.option_strings} | args.overrides_taken
    taken |= {option.removeprefix("--config."): option for option in args.overrides_taken.values()}
    if "--config" in taken:
        taken |= {name: f"--config {name}" for name in shipped.names()}
    near = difflib.get_close_matches(argument.partition("=")[0], taken, n=1)
    hint = f"; did you mean {taken[near[0]]}?" if near else "."
    raise ConfigError(f"Unknown argument {argument!r}{hint} See flax-switch {args.command} --help.")


# A recipe's kind -> the command that runs it, and a recipe of the kind.
_KINDS = {
    "pretraining": ("pretrain", "tiny"),
    "distillation": ("distill", "distill_tiny"),
    "finetuning": ("finetune", "finetune_summarization"),
}


def load_config(args: argparse.Namespace) -> Any:
    """Returns the recipe that the arguments name; raises `ConfigError` where it is of another kind than the command's."""
    config = load_any(args)
    if config.kind != args.kind:
        raise ConfigError(
            f"{args.config or args.gin_file[0]} is a recipe for flax-switch {command_of(config)}; this command takes one such as "
            f"{_KINDS[args.kind][1]}."
        )
    return config


def command_of(config: Recipe) -> str:
    """Returns the command that runs a recipe."""
    return _KINDS[config.kind][0]


def load_any(args: argparse.Namespace) -> Recipe:
    """Returns what the arguments name, of any kind."""
    from flax_switch.config import recipes

    if bool(args.config) == bool(args.gin_file):
        raise ConfigError(
            "Name a recipe: either --config tiny or --gin-file tiny, or files of your own; `flax-switch recipes` lists them."
        )
    if args.config:
        if args.bindings:
            raise ConfigError("--gin.… binds fields of a --gin-file; with --config use --config.SECTION.FIELD=VALUE.")
        return recipes.load_recipe(args.config, args.overrides)
    if args.overrides:
        raise ConfigError("--config.… sets fields of a --config recipe; with --gin-file use --gin.SECTION.FIELD=VALUE.")
    return recipes.load_gin(args.gin_file, args.bindings)


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed, and what JAX's cluster detection does not know."""
    group = parser.add_argument_group("several processes", "Every process is started with the same command; see docs/launching.md.")
    group.add_argument(
        "--distributed", action="store_true",
        help="this is one of several processes; the rest is detected on Cloud TPU, SLURM, Open MPI and Kubernetes",
    )  # fmt: skip
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0; or JAX_COORDINATOR_ADDRESS")
    group.add_argument("--num-processes", type=int, metavar="N", help="or JAX_NUM_PROCESSES")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N-1; or JAX_PROCESS_ID")
    group.add_argument("--heartbeat-timeout", type=int, metavar="S", help="seconds after which a silent process is dead (60)")
    group.add_argument("--connect-timeout", type=int, metavar="S", help="seconds in which all processes must have started (300)")


def add_mesh_argument(parser: argparse.ArgumentParser, instead: str) -> None:
    """Adds --mesh. instead: what is taken where it is not given."""
    parser.add_argument("--mesh", metavar="AXES", help=f"{instead}: data=2,expert=4,model=2; data takes what is left")


def read_mesh(text: str, base: MeshConfig) -> MeshConfig:
    """Returns the mesh of text like 'expert=16,model=1'; axes not named are 1, but data takes what is left."""
    from flax_switch.config.values import parse_assignment

    form = "--mesh is written like data=2,expert=4,model=2, or expert=8"
    sizes = dict(parse_assignment(part, form) for part in text.split(","))
    return base.replace(**{"data": -1, "expert": 1, "model": 1, **sizes})


def connection(args: argparse.Namespace) -> Connection | None:
    """Returns how this process finds the others, or None where it runs alone. Raises `ConfigError` for settings that cannot be."""
    names = ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout", "connect_timeout")
    given = {name: getattr(args, name) for name in names}
    if not args.distributed:
        unused = [hyphened(f"--{name}") for name, value in given.items() if value is not None]
        if unused:
            raise ConfigError(f"{', '.join(unused)} are for several processes: add --distributed.")
        return None
    from flax_switch.parallel.processes import Connection

    return Connection.resolved(**given)
