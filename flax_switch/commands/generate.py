"""flax-switch generate --checkpoint PATH [--input FILE|-] [--output FILE] [--max-new-tokens N ...]"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import stat
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.commands.checkpoints import add_loading_arguments, add_verify_argument, loading_changes, loading_options
from flax_switch.commands.options import (
    add_compile_cache_argument,
    add_distributed_arguments,
    add_mesh_argument,
    connection,
    hyphened,
    read_mesh,
    refuse,
    start_jax,
    tell,
)
from flax_switch.commands.partial import Partial, digest_of
from flax_switch.config import ConfigError, MeshConfig, check, one_of
from flax_switch.config.ranges import shown

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flax_switch.config.generation import GenerationConfig
    from flax_switch.generation.text import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds checkpoint, files, batching, and the controls of generation by their names."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run, a Hugging Face folder or a folder of ours")
    parser.add_argument("--input", default="-", metavar="FILE", help="text or JSON lines; - is standard input (the default)")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    parser.add_argument(
        "--format", metavar="FORM",
        help="of standard output: plain, the outputs alone, which is the default on a terminal; or json, which is it elsewhere",
    )  # fmt: skip
    parser.add_argument("--stream", action="store_true", help="write each text to standard output while it is made, line by line")
    parser.add_argument("--resume", action="store_true", help="go on with what a run that was cut off left in FILE.partial")
    parser.add_argument("--field", default="text", help="of JSON lines (default: text)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-source-length", type=int, default=512, help="tokens; longer lines are errors")
    parser.add_argument("--prefix", metavar="TEXT", help="put before every text; default: what the model was fine-tuned with")
    parser.add_argument(
        "--source-language", metavar="CODE", help="of texts to translate, such as eng_Latn, where the vocabulary has them"
    )
    parser.add_argument("--target-language", metavar="CODE", help="the one to translate into, such as fra_Latn")
    parser.add_argument("--no-prefix", action="store_true", help="put nothing before texts")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", help="of the parameters, for instance bfloat16; default: the checkpoint's")
    add_loading_arguments(parser)
    add_verify_argument(parser)
    add_mesh_argument(parser, "lay the model out over devices; default: one device, of several processes data over all they have")
    add_distributed_arguments(parser)
    add_compile_cache_argument(parser)
    parser.set_defaults(listing=_listing)
    parser.epilog = (
        "Controls, below, have Hugging Face's names: --max-new-tokens 64 --num-beams 4, or --do-sample --temperature 0.7."
    )


def control_options() -> dict[str, str]:
    """Returns the options that set controls, and the controls' names."""
    from flax_switch.config.generation import GenerationConfig

    return {hyphened(f"--{field.name}"): field.name for field in dataclasses.fields(GenerationConfig)}


def _listing() -> str:
    from flax_switch.commands.fields import described, listing
    from flax_switch.config.generation import GenerationConfig

    fields = [field._replace(name=field.name.replace("_", "-")) for field in described(GenerationConfig)]
    return listing("controls", fields, "--{name}")


def take_overrides(args: argparse.Namespace, rest: list[str]) -> None:
    """Reads the controls, which argparse does not know: `--num-beams 4` or `--num-beams=4`. Raises for what cannot be."""
    from flax_switch.config.generation import INSTEAD, GenerationConfig
    from flax_switch.config.values import parse_value

    fields = control_options()
    flags = {field.name for field in dataclasses.fields(GenerationConfig) if bool in (field.type, *typing.get_args(field.type))}
    args.controls, args.overrides_taken, rest = {}, dict(zip(fields, fields, strict=True)), list(rest)
    while rest:
        name, equals, value = rest[0].partition("=")
        instead = INSTEAD.get(name.removeprefix("--").replace("-", "_"), "")
        check(not instead, f"{name} is no control: {instead}.")
        if name not in fields:
            refuse(args, rest[0])
        rest.pop(0)
        if not equals and fields[name] in flags and (not rest or rest[0].startswith("--")):
            args.controls[fields[name]] = True
            continue
        check(equals or rest, f"{name} needs a value, as in --num-beams 4.")
        args.controls[fields[name]] = parse_value(value if equals else rest.pop(0))


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where some lines could not be used. All that can be checked is, before weights are loaded."""
    from flax_switch.config.generation import GenerationConfig
    from flax_switch.convert.checkpoint import open_checkpoint
    from flax_switch.generation.defaults import read_defaults, read_prefixes, with_defaults
    from flax_switch.generation.generate import check_seeds
    from flax_switch.generation.stream import check_streamed
    from flax_switch.pretrained.adapter import adapter_of

    for name in ("batch_size", "max_source_length"):
        value = getattr(args, name)
        check(1 <= value <= 2**20, f"{hyphened(f'--{name}')} must lie in [1, {2**20}]; it is {shown(value)}.")
    check_seeds(args.seed, 1)
    one_of("--format", args.format or "json", ("plain", "json"))
    check(args.format is None or args.output is None, "--format is of standard output; an --output is JSON lines.")
    loading, others = {"dtype": args.dtype, **loading_options(args)}, connection(args)
    check(others is None or args.input != "-", "Standard input is one process's: name a file that all can read with --input.")
    check(others is None or not args.stream, "--stream writes what one process generates; leave it out, or --distributed.")
    opened = open_checkpoint(args.checkpoint, changes=loading_changes(args), verify=not args.no_verify)
    prefix, args.controls = _languages(args, opened)
    controls = GenerationConfig(**with_defaults(read_defaults(opened.path), args.controls)).for_model(opened.config)
    if args.stream:
        check(args.output is None and args.format != "json", "--stream writes plain text to standard output; leave out --output.")
        check_streamed(controls)
        check(controls.num_return_sequences == 1, "--stream writes one text a line; leave out --num-return-sequences.")
    options = {"batch_size": args.batch_size, "max_source_length": args.max_source_length, "seed": args.seed, **args.controls}
    prefixes = read_prefixes(opened.path)
    if args.adapter is not None:
        adapter = loading["adapter"] = adapter_of(args.adapter, opened, verify=not args.no_verify)
        prefixes = adapter.prefixes or prefixes
    options["prefix"] = _prefix(args, prefixes) if prefix is None else prefix
    start_jax(args)
    from flax_switch.parallel import processes

    with processes.session(others):
        loading |= {} if others is None and args.mesh is None else {"mesh": _mesh(args)}
        return _generate(args, controls, opened, loading, options)


def _mesh(args: argparse.Namespace) -> Mesh:
    """Returns the mesh to lay the model out over; raises for a batch that it does not divide."""
    from flax_switch.parallel.mesh import batch_ways, create_mesh

    mesh = create_mesh(MeshConfig() if args.mesh is None else read_mesh(args.mesh, MeshConfig()))
    ways = batch_ways(mesh)
    check(
        args.batch_size % ways == 0,
        f"--batch-size ({args.batch_size}) must be a multiple of the {ways} devices that a batch is split over.",
    )
    return mesh


def _generate(
    args: argparse.Namespace, controls: GenerationConfig, opened: Any, loading: dict[str, Any], options: dict[str, Any]
) -> int:
    """Returns the exit status, when all lines are generated from; in several processes each has their results."""
    import jax

    from flax_switch.parallel import processes
    from flax_switch.pretrained import from_checkpoint

    if args.input == "-" and sys.stdin.isatty():
        streamed = controls.num_beams == controls.num_return_sequences == 1 and not controls.output_scores
        return _converse(from_checkpoint(opened, **loading), options, streamed)
    lines, first = _lines(args), jax.process_index() == 0
    run = _run(args, opened, lines, options)
    same = {name: getattr(args, name) for name in ("checkpoint", "output", "batch_size", "mesh", "format", "resume")}
    processes.require_same({**same, **options, "lines": len(lines), "lines and checkpoint (by hash)": digest_of(run)})
    if args.stream:
        results = _streamed(from_checkpoint(opened, **loading), lines, options)
    elif args.output is None:
        check(not args.resume, "--resume continues an --output; standard output is not kept.")
        results = _results(from_checkpoint(opened, **loading), lines, options)
        plain = args.format == "plain" or (args.format is None and sys.stdout.isatty())
        escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
        for result in results if first else ():
            lines = result.get("outputs", ()) if plain else [json.dumps(result, ensure_ascii=escaped)]
            sys.stdout.writelines(f"{line}\n" for line in lines)
    else:
        results = _to_file(args, opened, loading, lines, options, run)
    bad = [result for result in results if "error" in result]
    for result in bad if first else ():
        print(f"{args.input}, line {result['line']}: {result['error']}.", file=sys.stderr)
    return 1 if bad else 0


def _languages(args: argparse.Namespace, opened: Any) -> tuple[str | None, dict[str, Any]]:
    """Returns the prefix that a source language is, and the controls with the target's; nothing is read where none is named."""
    from flax_switch.convert.tokenizer import load_vocabulary
    from flax_switch.generation.text import with_languages

    source, target = args.source_language, args.target_language
    if source is None and target is None:
        return None, args.controls
    given = args.prefix if source is not None else None
    prefix, controls = with_languages(load_vocabulary(opened.path), given, args.controls, source, target)
    return prefix if source is not None else None, controls


def _prefix(args: argparse.Namespace, prefixes: tuple[str, ...]) -> str:
    check(not (args.prefix and args.no_prefix), "--prefix and --no-prefix contradict each other; leave one out.")
    if args.no_prefix or args.prefix is not None:
        return args.prefix or ""
    if len(prefixes) > 1:
        tell(
            f"The model was fine-tuned on tasks with {' or '.join(map(repr, prefixes))} before their texts. Yours are taken as "
            "they are: begin each as its task does, or put one before all, such as "
            f"--prefix={shlex.quote(next(filter(None, prefixes)))}; --no-prefix leaves out this note."
        )
        return ""
    prefix = "".join(prefixes)
    if prefix and sys.stderr.isatty():
        tell(f"The model was fine-tuned with {prefix!r} before every text, which is put there; --no-prefix leaves it out.")
    return prefix


def _lines(args: argparse.Namespace) -> list[Line]:
    from flax_switch.generation.text import read_lines

    try:
        with open(args.input, "rb") if args.input != "-" else sys.stdin.buffer as file:  # bytes: a bad line is one line's error
            endless = args.input != "-" and stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty()
            check(not endless, f"{args.input} is a device; --input takes a file or a pipe.")
            return read_lines(file, args.field)
    except OSError as error:
        raise ConfigError(f"Cannot read {args.input}: {error}.") from error


def _run(args: argparse.Namespace, opened: Any, lines: list[Line], options: dict[str, Any]) -> dict[str, Any]:
    """Returns all that results depend on."""
    from flax_switch.host.files import absolute

    run = {**options, "batch_size": None, "checkpoint": str(absolute(opened.path)), "dtype": args.dtype}
    if args.adapter is not None:
        run["adapter"] = str(absolute(args.adapter))
    if args.weights is not None:
        run["weights"] = args.weights
    return {**run, "lines": [dataclasses.astuple(line) for line in lines]}


def _to_file(
    args: argparse.Namespace, opened: Any, loading: dict[str, Any], lines: list[Line], options: dict[str, Any], run: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the results of all lines, those of an earlier run included; they are in the output file then.

    Of several processes the first alone reads and writes that file, and what it had from an earlier run stays with it.
    """
    import jax

    from flax_switch.host.files import check_writable
    from flax_switch.parallel import processes
    from flax_switch.pretrained import from_checkpoint

    def made(done: dict[int, dict[str, Any]], keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
        known = dict(processes.from_first([[number, "error" in result] for number, result in done.items()]))
        missing = [line for line in lines if line.number not in known]
        results = _results(from_checkpoint(opened, **loading), missing, options, keep) if missing else []
        return results + [{"line": number, "error": ""} for number, bad in known.items() if bad]

    if jax.process_index() > 0:
        return made({}, lambda results: None)
    output = Path(args.output)
    check_writable(output, reads=["/dev/stdin" if args.input == "-" else args.input])
    with Partial(output, run, resume=args.resume) as partial:
        made(dict(partial.done), partial.add)
        partial.finish()
    return [partial.done[line.number] for line in lines]


def _results(
    pretrained: Any, lines: list[Line], options: dict[str, Any], keep: Callable[[list[dict[str, Any]]], None] = lambda results: None
) -> list[dict[str, Any]]:
    """Returns the lines' results, which `keep` is told batch by batch; shows how far it is."""
    from flax_switch.generation.text import generate_lines

    started, done = time.perf_counter(), [0, 0]

    def progress(finished: int, tokens: int) -> None:
        done[0], done[1] = done[0] + finished, done[1] + tokens
        _note(f"{done[0]}/{len(lines)} lines, {done[1] / (time.perf_counter() - started):,.0f} tokens/s")

    _note("compiling")
    results = generate_lines(pretrained, lines, on_batch=progress, on_results=keep, **options)
    _note("")
    if pretrained.expert_reads is not None:
        tell(str(pretrained.expert_reads))
    return results


def _streamed(pretrained: Any, lines: list[Line], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes the texts of all lines while they are made; returns what is wrong with those that cannot be used."""
    bad = []
    _note("compiling")
    for line in lines:
        try:
            _write_pieces(pretrained, line, options)
        except ConfigError as problem:
            bad.append({"line": line.number, "error": str(problem)})
    _note("")
    if pretrained.expert_reads is not None:
        tell(str(pretrained.expert_reads))
    return bad


def _write_pieces(pretrained: Any, line: Line, options: dict[str, Any]) -> None:
    """Writes a line's text while it is made; raises `ConfigError` for a line that cannot be used."""
    from flax_switch.generation.stream import stream_line

    begun = False
    for text in stream_line(pretrained, line, **{name: value for name, value in options.items() if name != "batch_size"}):
        if text and not begun:
            _note("")
            begun = True
        print(text, end="", flush=True)
    print(flush=True)


def _note(text: str) -> None:
    """Shows where the work stands, in place of the former note; only on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _converse(pretrained: Any, options: dict[str, Any], streamed: bool) -> int:
    """Reads a line and prints its continuation, as it is made if `streamed`, until an empty line or the end of input."""
    from flax_switch.generation.text import Line, generate_lines

    print("Type a text and Enter; an empty line ends.")
    number = 0
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return 0
        except UnicodeDecodeError as problem:
            print(f"That is not {problem.encoding.upper()}: {problem.reason}.")
            continue
        if not text:
            return 0
        number += 1
        _note("compiling" if number == 1 else "")
        if streamed:
            try:
                _write_pieces(pretrained, Line(number, text), options)
            except ConfigError as problem:
                print(problem)
            continue
        (result,) = generate_lines(pretrained, [Line(number, text)], **{**options, "batch_size": 1})
        _note("")
        print(result.get("error") or "\n".join(result["outputs"]))
