"""Summarization of package descriptions: what pre-training on their own text is worth, within 40 minutes on 2 cores.

    python benchmarks/summarization.py --workdir runs/summarization         # run it again to go on where it was stopped

Builds the data (scripts/data/debian_descriptions.py: on Debian or Ubuntu, or with --files), pre-trains a small Switch Transformer
on the descriptions of the training split, mostly by infilling, and fine-tunes it on descriptions and synopses. The same model is
fine-tuned from random weights, with the same recipe for the same number of steps. Printed are ROUGE F-measures on held-out pairs,
of both and of the first sentences cut to the mean length of a synopsis. Every stage is a command of the command line, printed
before it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import run_record

from flax_switch.workflows.scores import score

ROOT = Path(__file__).parents[1]
SCORES = ("rouge1", "rouge2", "rougeL")


def stage(name: str, workdir: Path, command: list[str]) -> None:
    """Runs a command unless it has finished before, and adds up the seconds it took."""
    record = workdir / "seconds.json"
    seconds = json.loads(record.read_text()) if record.exists() else {}
    if seconds.get(name, {}).get("finished"):
        return
    print(f"\n== {name}: {shlex.join(command)}", flush=True)
    start, cpu = time.perf_counter(), _cpu_seconds()
    result = subprocess.run(command, cwd=ROOT)
    spent = seconds.setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0})
    spent["seconds"] += time.perf_counter() - start
    spent["cpu_seconds"] += _cpu_seconds() - cpu
    spent["finished"] = result.returncode == 0
    record.write_text(json.dumps(seconds, indent=1) + "\n")
    if result.returncode:
        sys.exit(result.returncode)


def _cpu_seconds() -> float:
    """Processor time of all commands so far; unlike the clock it does not count what else the machine did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def flax_switch(command: str, **options: object) -> list[str]:
    """The command line of a command; names with a dot are fields of its recipe."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]
    return [sys.executable, "-m", "flax_switch.cli", command, *flags]


def first_sentences(descriptions: list[str], words: int) -> list[str]:
    """The baseline."""
    sentences = (re.split(r"(?<=[.!?])\s+(?=[A-Z])", description, maxsplit=1)[0] for description in descriptions)
    return [" ".join(sentence.split()[:words]) for sentence in sentences]


def main() -> None:
    """Runs the stages, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--files", type=Path, help="a folder of archive indices, instead of asking apt")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning, both times")
    parser.add_argument("--examples", type=int, default=500, help="of the test split, spread evenly over it")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/summarization.json")
    args = parser.parse_args()
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    data = workdir / "data"
    files = ["--files", str(args.files)] if args.files else []
    stage("data", workdir, [sys.executable, "scripts/data/debian_descriptions.py", str(data), *files])
    stage(
        "pre-training",
        workdir,
        flax_switch(
            "pretrain", config="configs/descriptions_small.py", workdir=workdir / "pretrained",
            config__data__source=data / "corpus/en.txt", config__data__cache_dir=workdir / "cache",
        ),
    )  # fmt: skip
    recipe = dict(config="configs/finetune_descriptions.py")
    pretrained = workdir / "pretrained"
    models = {"pre-trained": pretrained, "random weights": f"random:{pretrained}"}
    predictions = {}
    for name, init in models.items():
        folder = workdir / name.replace(" ", "_")
        stage(
            f"fine-tuning, {name}",
            workdir,
            flax_switch(
                "finetune", **recipe, init=init, workdir=folder,
                config__data__train=data / "summarization/train.jsonl",
                config__data__validation=data / "summarization/validation.jsonl",
                config__train__steps=args.steps, config__train__eval_every=args.steps,
            ),
        )  # fmt: skip
        stage(
            f"evaluation, {name}",
            workdir,
            flax_switch(
                "evaluate", checkpoint=folder, output=folder / "test",
                config__data__validation=data / "summarization/test.jsonl", config__evaluation__max_examples=args.examples,
            ),
        )  # fmt: skip
        lines = (folder / "test/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        predictions[name] = [json.loads(line) for line in lines]
    report(predictions, data, workdir, args)


def report(predictions: dict[str, list[dict]], data: Path, workdir: Path, args: argparse.Namespace) -> None:
    """The table of scores on the same examples, and how long everything took."""
    examples = predictions["pre-trained"]
    references = [example["references"] for example in examples]
    with open(data / "summarization/train.jsonl", encoding="utf-8") as file:
        words = statistics.mean(len(json.loads(line)["synopsis"].split()) for line in file)
    descriptions = [example["inputs"].removeprefix("summarize: ") for example in examples]
    texts = {f"first sentence, {round(words)} words": first_sentences(descriptions, round(words))}
    texts |= {name: [p["prediction"] for p in predictions[name]] for name in ("random weights", "pre-trained")}
    rows = {name: score("rouge", made, references) for name, made in texts.items()}
    print(f"\nROUGE F-measure on {len(examples)} held-out descriptions; {args.steps} steps of fine-tuning")
    print(f"{'':28}" + "".join(f"{name:>9}" for name in SCORES))
    for name, scores in rows.items():
        print(f"{name:28}" + "".join(f"{scores[column]:9.2f}" for column in SCORES))
    seconds = json.loads((workdir / "seconds.json").read_text())
    print(f"\n{'':28}  minutes  of CPU time")
    for name, spent in seconds.items():
        print(f"{name:28}{spent['seconds'] / 60:9.1f}{spent['cpu_seconds'] / 60:19.1f}")
    shown = zip(descriptions, texts["pre-trained"], texts["random weights"], references, strict=True)
    for description, pretrained, random, reference in list(shown)[:5]:
        print(f"\n  {description[:160]}\n    pre-trained: {pretrained}\n    random:      {random}\n    written:     {reference[0]}")
    result = dict(
        examples=len(examples),
        steps=args.steps,
        scores={name: {column: round(scores[column], 2) for column in SCORES} for name, scores in rows.items()},
        seconds=seconds,
    )
    run_record.write(args.output, result)


if __name__ == "__main__":
    main()
