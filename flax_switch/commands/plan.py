"""flax-switch plan --config configs/switch_base_128.py --topology v5e:4x4 [--mesh expert=16] [--json FILE] [--save-program DIR]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flax_switch.commands.options import add_mesh_argument, add_recipe_arguments, load_config, read_mesh, take_overrides
from flax_switch.host.compilers import PACKAGES
from flax_switch.host.files import check_writable, write_text
from flax_switch.host.jax_settings import jax_setting

__all__ = ["add_arguments", "run", "take_overrides"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds recipe, overrides, machine and mesh."""
    add_recipe_arguments(parser, "pretraining")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:4x4, v6e:16x16, v5p:8x8x8, h100:8, cpu:8, ...")
    add_mesh_argument(parser, "in place of the recipe's")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the plan as JSON, too")
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True, help="compile a step of generation, too")
    parser.add_argument(
        "--effort", help="of the compiler: quick, or full as in training (default: full for GPUs and --save-program)"
    )
    parser.add_argument("--save-program", metavar="DIR", help="keep the compiled train step there, for pretrain --program DIR")
    parser.add_argument("--no-compile", action="store_true", help="only what shapes and shardings tell, in seconds")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; exit status 0, or 1 where it does not fit."""
    if args.json:
        check_writable(args.json)
    if args.save_program:
        check_writable(f"{args.save_program}/program.json", make_folders=True)
    import jax

    if jax_setting("jax_platforms") is None:
        jax.config.update("jax_platforms", "cpu")  # compilers for other devices run without starting them
    config = load_config(args)
    mesh = config.mesh if args.mesh is None else read_mesh(args.mesh, config.mesh)
    from flax_switch.plan import plan
    from flax_switch.plan.text import render

    options: dict[str, Any] = dict(
        compile=not args.no_compile, decode=args.decode, effort=args.effort, save_program=args.save_program
    )
    found = plan(config, args.topology, mesh, **options)
    print(render(found, Path(args.config or args.gin_file[0]).stem))
    if found.train is not None and found.train.refusal is None and args.save_program:
        print(f"  the train step is in {args.save_program}: start the run with --program {args.save_program}")
    if args.json:
        write_text(args.json, json.dumps({"about": _about(), **found.to_dict()}, indent=1) + "\n")
    return 1 if found.fits is False else 0


def _about() -> dict[str, Any]:
    """Returns what the plan was made with: it depends on the compilers' versions, and not on this machine's devices."""
    from flax_switch.training import sessions

    here = sessions.surroundings()
    compilers = [package for packages in PACKAGES.values() for package in packages]
    versions = here["versions"] | {name: found for name in compilers if (found := sessions.version_of(name))}
    return {
        "command": sessions.command(),
        "time": sessions.now(),
        "host": here["host"],
        "python": here["python"],
        "versions": versions,
    }
