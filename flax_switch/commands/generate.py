"""flax-switch generate --checkpoint PATH [--input FILE|-] [--output FILE] [--max_new_tokens N ...]"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from flax_switch.config import ConfigError, reject_unknown_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, files, batching, and the controls of generation by their names."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run, a Hugging Face folder or a folder of ours")
    parser.add_argument("--input", default="-", metavar="FILE", help="text or JSON lines; - is standard input (the default)")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    parser.add_argument("--field", default="text", help="of JSON lines (default: text)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_source_length", type=int, default=512, help="tokens; longer lines are errors")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", help="of activations, for instance bfloat16; default: the checkpoint's")
    parser.epilog = (
        "Controls have Hugging Face's names: --max_new_tokens 64 --num_beams 4 --do_sample true --temperature 0.7 --top_p 0.9 ..."
    )


def take_overrides(args: argparse.Namespace, rest: list[str]) -> None:
    """Reads the controls: what argparse did not know."""
    args.controls, rest = {}, list(rest)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise ConfigError(f"Unknown argument {name!r}; controls are given as --num_beams 4 or --num_beams=4. See --help.")
        args.controls[name[2:].replace("-", "_")] = value if equals else rest.pop(0)


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 where some lines could not be used."""
    from flax_switch.config.values import parse_value
    from flax_switch.generation.controls import GenerationConfig
    from flax_switch.generation.text import generate_lines, read_lines
    from flax_switch.pretrained import load_pretrained

    controls = {name: parse_value(value) for name, value in args.controls.items()}
    reject_unknown_keys(GenerationConfig, controls)
    options = {"batch_size": args.batch_size, "max_source_length": args.max_source_length, "seed": args.seed, **controls}
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1; it is {args.batch_size}.")
    pretrained = load_pretrained(args.checkpoint, **({"dtype": args.dtype} if args.dtype else {}))
    if args.input == "-" and sys.stdin.isatty():
        return _converse(pretrained, options)
    try:
        with open(args.input, "rb") if args.input != "-" else sys.stdin.buffer as file:  # bytes: a bad line is one line's error
            lines = read_lines(file, args.field)
    except OSError as error:
        raise ConfigError(f"Cannot read {args.input}: {error}.") from error
    started, done = time.perf_counter(), [0, 0]

    def progress(finished: int, tokens: int) -> None:
        done[0], done[1] = done[0] + finished, done[1] + tokens
        rate = done[1] / (time.perf_counter() - started)
        print(f"\r{done[0]}/{len(lines)} lines, {rate:,.0f} tokens/s", end="", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if args.output:  # opened first: a place that cannot be written should not cost the work
            try:
                file = stack.enter_context(open(args.output, "w", encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"Cannot write {args.output}: {error}.") from error
        results = generate_lines(pretrained, lines, on_batch=progress, **options)
        if done[0]:
            print(file=sys.stderr)
        for result in results:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
    bad = [result for result in results if "error" in result]
    for result in bad:
        print(f"{args.input}, line {result['line']}: {result['error']}.", file=sys.stderr)
    return 1 if bad else 0


def _converse(pretrained: Any, options: dict[str, Any]) -> int:
    """A line in, its continuation out, until an empty line or the end of input."""
    from flax_switch.generation.text import Line, generate_lines

    print("Type a text and Enter; an empty line ends.")
    number = 0
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return 0
        if not text:
            return 0
        number += 1
        (result,) = generate_lines(pretrained, [Line(number, text)], **{**options, "batch_size": 1})
        print(result.get("error") or "\n".join(result["outputs"]))
