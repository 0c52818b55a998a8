"""One model of many languages beside one model each: the held-out loss of every language, after equal steps.

    python scripts/data/debian_descriptions.py data/debian --languages fr de ru es fi    # or text of your own, see --text
    python benchmarks/multilingual.py --workdir runs/languages           # run it again to go on where it was stopped

All runs are of the recipe configs/multilingual_tiny.py and have one vocabulary, so that losses are comparable token for token: the
sparse model on all languages drawn by size to the power of 0.3, the dense one of as much arithmetic a token likewise, the sparse
one on each language alone, and the sparse one on all for as many steps as these took together. Printed and written are nats a
token over the same held-out batches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import run_record

from flax_switch.config import DataConfig, ExperimentConfig, SourceConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.data import prepare
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.pretrain import pretrain

LONG = "all, sparse, for all steps"


def configs_of(args: argparse.Namespace) -> dict[str, ExperimentConfig]:
    """Returns what every run does, by its name; one on a single language is named by it."""
    recipe = load_recipe("multilingual_tiny")
    assert isinstance(recipe, ExperimentConfig)
    names = args.languages or [source.name for source in recipe.data.mixture]
    sources = tuple(SourceConfig(name=name, source=str(args.text / f"{name}.txt")) for name in names)
    given = args.workdir / "vocabulary" / "spiece.model"
    data = recipe.data.replace(mixture=sources)
    if not given.exists():
        given.parent.mkdir(parents=True, exist_ok=True)
        prepare(data).vocabulary.save(given.parent)
    data = data.replace(vocabulary=str(given))

    def run(data: DataConfig, steps: int, batches: int, **model: Any) -> ExperimentConfig:
        every = dict(steps=steps, eval_every=steps, checkpoint_every=steps, log_every=steps // 10, sample_spans=0)
        train = recipe.train.replace(eval_batches=batches, log_to=(), **every)
        return recipe.replace(model=recipe.model.replace(**model), data=data, train=train)

    everywhere = args.batches * len(sources)
    dense = dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    alone = {s.name: run(data.replace(mixture=(), source=s.source), args.steps, args.batches) for s in sources}
    return {
        "all, sparse": run(data, args.steps, everywhere),
        "all, dense": run(data, args.steps, everywhere, **dense),
        **alone,
        LONG: run(data, args.steps * len(sources), everywhere),
    }


def run_of(name: str, config: ExperimentConfig, workdir: Path) -> dict[str, Any]:
    """Returns the last evaluation of a run; one that has ended is not run again."""
    pretrain(config, workdir)
    lines = read_metrics(workdir)
    last = next(line for line in reversed(lines) if line["kind"] == "eval")
    losses = {key.partition("/")[0]: value for key, value in last.items() if key.endswith("/cross_entropy")}
    seconds = [line["seconds_per_step"] for line in lines if line["kind"] == "train"]
    return {
        "steps": config.train.steps,
        "cross_entropy": losses or {name: last["cross_entropy"]},
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "encoder_gain": {key.partition("/")[2]: value for key, value in last.items() if key.startswith("encoder_gain/")},
    }


def main() -> None:
    """Runs all, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, default=Path("data/debian/corpus"), help="a folder of one file a language: en.txt, ..."
    )
    parser.add_argument("--languages", nargs="+", help="names of such files; default: the recipe's")
    parser.add_argument("--steps", type=int, default=300, help="of every run but the last")
    parser.add_argument("--batches", type=int, default=20, help="held-out batches of each language")
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "multilingual.json")
    args = parser.parse_args()
    configs = configs_of(args)
    runs = {name: run_of(name, config, args.workdir / f"{i}") for i, (name, config) in enumerate(configs.items())}
    prepared = prepare(configs["all, sparse"].data, quiet=True)
    languages = {about["name"]: about for about in prepared.describe()}
    together = [name for name in runs if name not in languages]
    print(f"{'':6}{'tokens':>12}{'rows, %':>9}{'alone':>9}" + "".join(f"{name:>30}" for name in together))
    for name, about in languages.items():
        losses = [runs[name]["cross_entropy"][name], *(runs[one]["cross_entropy"][name] for one in together)]
        tokens, share = about["train"]["tokens"], 100 * about["rate"]
        print(f"{name:6}{tokens:12,}{share:9.1f}{losses[0]:9.3f}" + "".join(f"{loss:30.3f}" for loss in losses[1:]))
    text = {name: {key: about[key] for key in ("rate", "train", "heldout")} for name, about in languages.items()}
    run_record.write(args.output, {"languages": text, "runs": json.loads(json.dumps(runs))})


if __name__ == "__main__":
    main()
