"""Workdirs of runs: config, checkpoints, metrics, samples, results that a kill cut short."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_switch import load_pretrained
from flax_switch.cli import main
from flax_switch.commands.partial import Partial
from flax_switch.config import ExperimentConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.convert.canonical import unflatten
from flax_switch.training.checkpoint import Checkpoints, claim_workdir
from flax_switch.training.state import TrainState
from flax_switch.workflows.report import write_report
from tests.fuzz.case import Reader
from tests.fuzz.readers.models import SMALL, flat, read_model, vocabulary

CONFIG = ExperimentConfig(model=SMALL)


def _workdir(folder: Path) -> None:
    claim_workdir(folder, CONFIG)
    vocabulary().save(folder / "vocabulary")
    names = ("fraction_tokens_left_behind", "router_confidence", "router_entropy")
    routers = {f"routers/{name}": [0.5, 0.5] for name in names} | {"routers/tokens_per_expert": [[8.0, 2.0], [5.0, 5.0]]}
    measured = ("cross_entropy", "text_cross_entropy", "unigram_entropy", "nats_below_unigram", "accuracy", "tokens_per_second")
    probed = (
        "encoder_gain/x",
        "masked_nats_below_unigram",
        "masked_accuracy",
        "masked_accuracy_of_most_frequent",
        "masked_spans_exact",
    )
    of_step = ("data_wait_fraction", "seconds_per_step", "learning_rate", "grad_norm", "loss")
    lines = [
        {"step": step, "kind": kind, **dict.fromkeys((*measured, *probed, *of_step), 0.5), **routers}
        for step in (1, 2)
        for kind in ("train", "eval")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.json").write_text(json.dumps([{"pieces": ["a", {"model": "b", "text": "c"}]}]))


def _run(folder: Path) -> None:
    _workdir(folder)
    checkpoints = Checkpoints(folder)
    key = jax.random.key_data(jax.random.key(0))
    params = unflatten({name: jnp.asarray(array) for name, array in flat().items()})
    for step in (1, 2):
        checkpoints.save(TrainState(jnp.int32(step), params, {"count": jnp.int32(step)}, key), {"position": step})
        checkpoints.wait()
    checkpoints.close()


def _claim(folder: Path, rng: random.Random) -> None:
    claim_workdir(folder, CONFIG)


def _evaluate_own_recipe(folder: Path, rng: random.Random) -> None:
    assert main(["evaluate", "--checkpoint", str(folder), "--output", str(folder / "config.json")]) == 2


def _finetuned(folder: Path) -> None:
    claim_workdir(folder, FinetuneConfig(model=SMALL))
    (folder / "checkpoints").mkdir()


def _report(folder: Path, rng: random.Random) -> None:
    write_report(folder)


def _partial(folder: Path) -> None:
    with Partial(folder / "out.jsonl", {"seed": 0}, resume=False) as partial:
        partial.add([{"line": number, "outputs": ["a"]} for number in range(1, 4)])


def _resume(folder: Path, rng: random.Random) -> None:
    with Partial(folder / "out.jsonl", {"seed": 0}, resume=True) as partial:
        partial.add([{"line": number, "outputs": ["b"]} for number in (1, 2, 3, 4)])
        partial.finish()


def _load(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        read_model(folder, rng)
    else:
        load_pretrained(folder)


READERS = {
    "run": Reader(_run, _load),
    "run-metadata": Reader(_run, _load, ("config.json", "_METADATA", "_CHECKPOINT_METADATA", "manifest*", "*.zarray")),
    "workdir": Reader(_workdir, _claim, ("config.json",)),
    "workdir-of-finetuning": Reader(_finetuned, _evaluate_own_recipe, ("config.json",)),
    "report": Reader(_workdir, _report, ("metrics.jsonl", "samples.json", "config.json"), warm=True),
    "partial-output": Reader(_partial, _resume),
}
