"""flax-switch predict --checkpoint PATH [--input FILE|-] [--output FILE]: what a model with the head of a task says of texts"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.commands.checkpoints import add_loading_arguments, add_verify_argument, loading_changes, loading_options
from flax_switch.commands.options import add_compile_cache_argument, start_jax
from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown

if TYPE_CHECKING:
    from flax_switch.pretrained import Pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds checkpoint, files and batching."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run, a Hugging Face folder or a folder of ours")
    parser.add_argument("--input", default="-", metavar="FILE", help="text or JSON lines; - is standard input (the default)")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    parser.add_argument("--field", default="text", help="of JSON lines, the text or the question (default: text)")
    parser.add_argument(
        "--context", default="context", metavar="FIELD", help="of JSON lines, where spans are found (default: context)"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", help="of the parameters, for instance bfloat16; default: the checkpoint's")
    add_loading_arguments(parser)
    add_verify_argument(parser)
    add_compile_cache_argument(parser)
    parser.epilog = "Classes, numbers, tags, spans or embeddings, as the model's head has it; a language model is for generate."


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where some lines could not be used."""
    from flax_switch.convert.checkpoint import open_checkpoint
    from flax_switch.host.files import check_writable, write_text
    from flax_switch.pretrained import from_checkpoint

    check(1 <= args.batch_size <= 2**20, f"--batch-size must lie in [1, {2**20}]; it is {shown(args.batch_size)}.")
    if args.output is not None:
        check_writable(Path(args.output), reads=["/dev/stdin" if args.input == "-" else args.input])
    opened = open_checkpoint(args.checkpoint, changes=loading_changes(args), verify=not args.no_verify)
    check(
        opened.architecture not in ("full", "headless"),
        f"{args.checkpoint} is a language model, which has no head for a task: use flax-switch generate, or fine-tune it with "
        "--config.model.head=... first.",
    )
    loading = {"dtype": args.dtype, **loading_options(args)}
    texts, contexts, errors = _read(args, opened.config.head == "question_answering")
    start_jax(args)
    model = from_checkpoint(opened, **loading)
    found = _said(model, list(texts.values()), list(contexts.values()), args.batch_size) if texts else []
    results = {number: {"line": number, "input": texts[number], **one} for number, one in zip(texts, found, strict=True)}
    escaped = args.output is None and not (sys.stdout.encoding or "").lower().startswith("utf")
    lines = {**results, **{number: {"line": number, "error": error} for number, error in errors.items()}}
    text = "".join(json.dumps(lines[number], ensure_ascii=escaped) + "\n" for number in sorted(lines))
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(args.output), text)
    for number, error in errors.items():
        print(f"{args.input}, line {number}: {error}.", file=sys.stderr)
    return 1 if errors else 0


def _read(args: argparse.Namespace, spans: bool) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Returns texts, contexts where spans are to be found, and what is wrong with other lines, by number."""
    from flax_switch.generation.text import read_lines

    try:
        with open(args.input, "rb") if args.input != "-" else sys.stdin.buffer as file:
            raw = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read {args.input}: {error}.") from error
    read = [read_lines(raw, args.field), *([read_lines(raw, args.context)] if spans else [])]
    errors = {line.number: line.error for lines in read for line in lines if line.error is not None}
    if spans:
        plain = [line.number for line in read[0] if not raw[line.number - 1].lstrip().startswith(b"{")]
        errors |= dict.fromkeys(plain, f"a question needs a context; write JSON lines with {args.field!r} and {args.context!r}")
    texts, *contexts = ({line.number: line.text for line in lines if line.number not in errors} for lines in read)
    return texts, contexts[0] if contexts else {}, errors


def _said(model: Pretrained, texts: list[str], contexts: list[str], batch_size: int) -> list[dict[str, Any]]:
    """Returns what the model's head says of each text, by names."""
    head = model.config.head
    if head == "classification":
        return [one._asdict() for one in model.classify(texts, batch_size=batch_size)]
    if head == "multi_label_classification":
        return [one._asdict() for one in model.label(texts, batch_size=batch_size)]
    if head == "regression":
        return [{"value": float(value)} for value in model.regress(texts, batch_size=batch_size)]
    if head == "token_classification":
        return [{"words": [word._asdict() for word in one]} for one in model.tag(texts, batch_size=batch_size)]
    if head == "question_answering":
        return [
            {"answer": a.text, "start": a.start, "end": a.end, "score": a.score}
            for a in model.answer(texts, contexts, batch_size=batch_size)
        ]
    return [{"embedding": vector.tolist()} for vector in model.embed(texts, batch_size=batch_size)]
