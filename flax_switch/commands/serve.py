"""flax-switch serve MODEL [NAME=MODEL ...] [NAME=ADAPTER ...] [--port 8000]"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from flax_switch.commands.checkpoints import FORMATS, add_expert_arguments, add_verify_argument, explain_missing_extras
from flax_switch.commands.options import add_compile_cache_argument, hyphened, start_jax
from flax_switch.config import check

KEY = "FLAX_SWITCH_API_KEY"
_HELP = {
    "slots": "sequences that decode at the same time, for each length of sources",
    "max_source_length": "tokens of a prompt, EOS included; longer ones are refused",
    "max_tokens": "tokens of an output at most",
    "queue": "sequences that wait for a slot; more are refused",
    "max_body": "bytes of a request at most",
    "timeout": "seconds from a request's arrival to its end",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the models, the address, and what is taken on."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help=f"{FORMATS}; or an adapter for one. NAME=MODEL has clients ask for it by that name, and NAME=MODEL+ADAPTER says by "
        "the name of a model what an adapter is for",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: 8000)")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"holds the key that clients must send; or the variable {KEY}")
    parser.add_argument(
        "--weights", choices=("int8", "int4", "bfloat16", "float16"), help="round kernels to it while they are read"
    )
    parser.add_argument("--dtype", help="of the parameters, for instance bfloat16; default: the checkpoint's")
    add_expert_arguments(parser)
    group = parser.add_argument_group("limits")
    for name, default in _defaults().items():
        group.add_argument(
            hyphened(f"--{name}"), type=type(default), default=default, metavar="N", help=f"{_HELP[name]} (default: {default})"
        )
    add_verify_argument(parser)
    add_compile_cache_argument(parser)


def _defaults() -> dict[str, Any]:
    from flax_switch.serving.limits import Limits

    return {field.name: field.default for field in dataclasses.fields(Limits)}


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Loads the models, compiles their programs and serves until it is told to end."""
    from flax_switch.serving.limits import Limits

    limits = Limits(**{name: getattr(args, name) for name in _defaults()})
    check(0 <= args.port < 65536, f"--port must lie in [0, 65535]; it is {args.port}.")
    key = _key(args)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError("Serving needs pip install 'flax_switch[serve]'.") from error
    from flax_switch.pretrained.on_disk import expert_budget
    from flax_switch.serving.guard import is_loopback
    from flax_switch.serving.loading import load, parse_models

    check(
        key or is_loopback(args.host),
        f"--host {args.host} can be reached from other machines: give a key, by --api-key-file or the variable {KEY}.",
    )
    asked = parse_models(args.models)
    expert_budget(args.experts, args.expert_memory)  # raises for what cannot be
    start_jax(args)
    from flax_switch.serving import serve

    logging.getLogger("flax_switch.serving").setLevel(logging.INFO)
    changes = {"scan_layers": False, **({"weights": args.weights} if args.weights else {})}
    options = {"dtype": args.dtype, "experts": args.experts, "expert_memory": args.expert_memory, "kernels": args.kernels}
    server = serve.prepare(load(asked, changes=changes, verify=not args.no_verify, **options), limits)

    def ready(port: int) -> None:
        print(f"Serving {', '.join(asked)} at http://{args.host}:{port} (Ctrl+C ends it).", file=sys.stderr, flush=True)

    serve.run(server, args.host, args.port, key, ready)
    return 0


def _key(args: argparse.Namespace) -> str | None:
    """Returns the key that clients must send, if there is one."""
    if args.api_key_file is None:
        key = os.environ.get(KEY)
        check(key is None or key.strip(), f"The variable {KEY} is empty; set it to a key, or unset it.")
    else:
        key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        check(key, f"{args.api_key_file} is empty; it must hold the key that clients send.")
    check(
        key is None or (key.isascii() and key.isprintable() and " " not in key),
        "The API key must be printable ASCII without blanks.",
    )
    return key
