"""Fine-tuning beside transformers and peft: the same checkpoint, the same examples, the same steps, three seeds of each.

    flax-switch pretrain --config t5_tiny --workdir runs/t5_tiny      # a dense model, which all can open
    python benchmarks/finetuning_peers.py --dense runs/t5_tiny --workdir runs/peers    # run it again to go on where it was stopped

Three tasks on the sentences of the quickstart's corpus, that need no download and can be told to be right:

    classification   which of six packages' documentation a sentence is from
    embedding        a sentence is to find the one that follows it, among 1,000
    rewriting        a sentence is written again without its articles, right to the letter; with adapters beside the whole model

The learning rate is picked here, with a seed of its own, and used there, too: the optimiser is the same, AdamW. Then three other
seeds draw new parameters, the order of examples and dropout. Controls: guessing the most frequent class, and random weights in the
checkpoint's place. "Here" is the dense model in this library, "there" the same in transformers, with adapters by peft.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import run_record

import flax_switch as fs
from flax_switch.config.adapter import AdapterConfig
from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.data.corpus import by_origin
from flax_switch.host.compile_cache import use_compile_cache
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.finetune import finetune

ARTICLES = re.compile(r"\b(?:a|an|the) ")
PICKING, SEEDS = 100, (1, 2, 3)
HELD_OUT, CLASSES, LARGEST_CLASS = 1000, 6, 3000
BATCH, WARMUP, TEMPERATURE = 32, 20, 0.05
LORA = AdapterConfig(rank=32, alpha=64.0)
LENGTHS = {"classification": (48, 1), "embedding": (48, 48), "rewriting": (40, 40)}
METRIC = {"classification": "accuracy", "embedding": "retrieval", "rewriting": "accuracy"}
SCORE = {"classification": "accuracy", "embedding": "recall_at_1", "rewriting": "accuracy"}


class Way(NamedTuple):
    """How a model is fine-tuned."""

    where: str  # "here" or "there"
    model: str = "dense"  # or "random" weights of its shapes
    adapter: AdapterConfig = AdapterConfig()
    rate_of: str = ""  # the way whose learning rate it takes; "": it picks from RATES
    dropout: float = 0.0  # here all tokens of a text share a mask, as in T5X; there each has its own


RATES = {"classification": (5e-4, 1e-3), "embedding": (3e-4, 1e-3), "rewriting": (1e-3, 3e-3)}
STEPS = {"classification": 500, "embedding": 200, "rewriting": 300}
WAYS = {
    "here": Way("here"),
    "there": Way("there", rate_of="here"),
    "here, random weights": Way("here", "random", rate_of="here"),
    "here, dropout": Way("here", rate_of="here", dropout=0.1),
    "there, dropout": Way("there", rate_of="here", dropout=0.1),
    "here, LoRA": Way("here", adapter=LORA),
    "there, LoRA": Way("there", adapter=LORA, rate_of="here, LoRA"),
}
OF_TASK = {
    "classification": ("here", "there", "here, random weights", "here, dropout", "there, dropout"),
    "embedding": ("here", "there", "here, dropout", "there, dropout"),
    "rewriting": ("here", "there", "here, LoRA", "there, LoRA", "here, dropout", "there, dropout"),
}


# --- tasks


def write_tasks(folder: Path) -> None:
    """Writes {task}/train.jsonl and validation.jsonl; a row's side follows from its hash."""
    documents = by_origin()
    largest = sorted(documents, key=lambda name: -sum(map(len, documents[name])))[:CLASSES]
    rows: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(dict)
    for name, texts in documents.items():
        of_class = []
        for text in texts:
            sentences = [s for s in re.split(r"(?<=\.) ", text) if 5 <= len(s.split()) <= 20 and len(s) <= 110]
            of_class += [s for s in sentences if name in largest]
            if len(sentences) > 1:
                rows["embedding"][sentences[0]] = {"text": sentences[0], "next": sentences[1]}
            for s in sentences:
                if len(s) <= 60 and ARTICLES.search(s):
                    rows["rewriting"][s] = {"text": s, "short": ARTICLES.sub("", s)}
        for s in sorted(set(of_class), key=_hash)[:LARGEST_CLASS]:
            rows["classification"][s] = {"text": s, "label": name}
    for task, found in rows.items():
        ordered = [found[key] for key in sorted(found, key=_hash)]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for side, part in (("validation", ordered[:HELD_OUT]), ("train", ordered[HELD_OUT:])):
            (folder / task / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(folder: Path, side: str) -> list[dict[str, str]]:
    """Returns the rows of one side of a task."""
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]


def labels_of(folder: Path) -> tuple[str, ...]:
    """Returns the classes, in the order of the alphabet."""
    return tuple(sorted({row["label"] for row in read_rows(folder, "train")}))


# --- here


def recipe_of(task: str, train: Path, model: dict[str, Any], rate: float, seed: int, steps: int) -> FinetuneRecipe:
    """Returns the recipe of a run on the rows of `train`, measured on those of validation.jsonl beside it."""
    inputs_length, targets_length = LENGTHS[task]
    return FinetuneRecipe(
        model=model,
        data=FinetuneDataConfig(
            train=str(train), validation=str(train.with_name("validation.jsonl")), inputs="text",
            targets={"classification": "label", "embedding": "next", "rewriting": "short"}[task],
            inputs_length=inputs_length, targets_length=targets_length, batch_size=BATCH, seed=seed,
        ),
        optimizer=FinetuneOptimizerConfig(name="adamw", learning_rate=rate, schedule="linear", warmup_steps=WARMUP),
        train=FinetuneTrainConfig(
            steps=steps, seed=seed, log_every=20, eval_every=steps, eval_batches=10, checkpoint_every=steps, sample_spans=0,
        ),
        evaluation=EvaluationConfig(metrics=(METRIC[task],), batch_size=100, num_beams=1),
    )  # fmt: skip


def run_here(task: str, way: Way, rate: float, seed: int, args: argparse.Namespace, workdir: Path) -> dict[str, float]:
    """Returns the scores of a run of this library's."""
    data = args.workdir / "data" / task
    head: dict[str, Any] = {"embedding": dict(head="embedding", contrastive_temperature=TEMPERATURE), "rewriting": {}}.get(
        task, dict(head="classification")
    )
    if task == "classification":
        head["labels"] = labels_of(data)
    model = dict(dropout_rate=way.dropout, **head)
    recipe = recipe_of(task, data / "train.jsonl", model, rate, seed, STEPS[task]).replace(adapter=way.adapter)
    finetune(recipe, workdir, init=str(args.dense) if way.model == "dense" else f"random:{args.dense}")
    last = next(line for line in reversed(read_metrics(workdir)) if line["kind"] == "eval")
    return {"score": last[SCORE[task]], "cross_entropy": last["cross_entropy"]}


# --- there


class There:
    """A model of transformers with the head of a task, the loss of a batch, and the score of the held-out rows."""

    def __init__(self, task: str, way: Way, folder: Path, data: Path, seed: int) -> None:
        import torch
        import transformers

        torch.manual_seed(seed)
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "classification": (transformers.T5ForSequenceClassification, dict(classifier_dropout=0.0)),
            "embedding": (transformers.T5EncoderModel, {}),
            "rewriting": (transformers.T5ForConditionalGeneration, {}),
        }
        kind, options = kinds[task]
        self.labels = labels_of(data) if task == "classification" else ()
        options |= dict(num_labels=len(self.labels)) if self.labels else {}
        self.model = kind.from_pretrained(folder, dropout_rate=way.dropout, **options)
        if way.adapter.rank:
            import peft

            settings = peft.LoraConfig(
                r=way.adapter.rank, lora_alpha=int(way.adapter.alpha), target_modules=["q", "k", "v", "o", "wi", "wo"]
            )
            self.model = peft.get_peft_model(self.model, settings)
        self.task, self.torch = task, torch
        self.vocabulary = fs.load_pretrained(str(folder)).vocabulary
        self.train, self.held_out = read_rows(data, "train"), read_rows(data, "validation")

    def ids(self, texts: Sequence[str], length: int) -> tuple[Any, Any]:
        """Returns ids [rows, tokens], closed by EOS and padded, and their mask."""
        rows = [[*self.vocabulary.encode(text)[: length - 1], 1] for text in texts]
        out = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return self.torch.tensor(out), self.torch.tensor(out != 0).long()

    def embed(self, texts: Sequence[str]) -> Any:
        """Returns the mean of the states of each text's tokens, of length 1."""
        ids, mask = self.ids(texts, LENGTHS["embedding"][0])
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.torch.nn.functional.normalize(mean, dim=-1)

    def loss(self, rows: Sequence[dict[str, str]]) -> Any:
        """Returns the loss of a batch."""
        if self.task == "embedding":
            texts, nexts = [row["text"] for row in rows], [row["next"] for row in rows]
            scores = self.embed(texts) @ self.embed(nexts).T / TEMPERATURE
            same = self.torch.tensor([[i != j and a == b for j, b in enumerate(nexts)] for i, a in enumerate(nexts)])
            scores = scores.masked_fill(same, -1e9)
            return self.torch.nn.functional.cross_entropy(scores, self.torch.arange(len(rows)))
        inputs_length, targets_length = LENGTHS[self.task]
        ids, mask = self.ids([row["text"] for row in rows], inputs_length)
        if self.task == "classification":
            labels = self.torch.tensor([self.labels.index(row["label"]) for row in rows])
        else:
            labels, kept = self.ids([row["short"] for row in rows], targets_length)
            labels = labels.masked_fill(kept == 0, -100)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def right(self, rows: Sequence[dict[str, str]]) -> int:
        """Returns how many held-out rows come out right."""
        ids, mask = self.ids([row["text"] for row in rows], LENGTHS[self.task][0])
        if self.task == "classification":
            found = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
            return sum(self.labels[i] == row["label"] for i, row in zip(found, rows, strict=True))
        made = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=LENGTHS["rewriting"][1], do_sample=False, num_beams=1
        )
        texts = self.vocabulary.batch_decode(made.tolist(), skip_special_tokens=True)
        return sum(text.strip() == row["short"].strip() for text, row in zip(texts, rows, strict=True))

    def score(self) -> float:
        """Returns the score of all held-out rows, per cent."""
        pieces = [self.held_out[i : i + 250] for i in range(0, len(self.held_out), 250)]
        if self.task != "embedding":
            return 100.0 * sum(map(self.right, pieces)) / len(self.held_out)
        wanted = [row["next"] for row in self.held_out]
        targets = list(dict.fromkeys(wanted))
        vectors = self.torch.cat([self.embed(targets[i : i + 100]) for i in range(0, len(targets), 100)])
        queries = self.torch.cat([self.embed([row["text"] for row in piece]) for piece in pieces])
        nearest = (queries @ vectors.T).argmax(-1).tolist()
        return 100.0 * sum(targets[i] == text for i, text in zip(nearest, wanted, strict=True)) / len(wanted)


def run_there(task: str, way: Way, rate: float, seed: int, args: argparse.Namespace, workdir: Path) -> dict[str, float]:
    """Returns the scores of a run of transformers', or of one that peft trains."""
    import torch

    folder = args.workdir / "dense_for_transformers"
    if not (folder / "config.json").exists():
        fs.load_pretrained(str(args.dense)).save_pretrained(str(folder), format="huggingface")
    there = There(task, way, folder, args.workdir / "data" / task, seed)
    trained = [p for p in there.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    def factor(step: int) -> float:  # linear from 0, and linear to 0 at the last step, as here
        return min(step / WARMUP, 1.0) * min(1.0, (STEPS[task] - step) / (STEPS[task] - WARMUP))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    there.model.train()
    losses = []
    for batch in shuffled(there.train, STEPS[task], seed):
        loss = there.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    there.model.eval()
    with torch.no_grad():
        return {"score": there.score(), "last_losses": statistics.mean(losses[-20:])}


def shuffled(rows: Sequence[Any], steps: int, seed: int) -> Iterator[list[Any]]:
    """Yields batches, each row once an epoch."""
    draw, left = random.Random(seed), []
    for _ in range(steps):
        if len(left) < BATCH:
            left = [*left, *draw.sample(list(rows), len(rows))]
        yield left[:BATCH]
        left = left[BATCH:]


# --- all runs


def run_of(task: str, name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a run measured; one that has ended is not run again."""
    workdir = args.workdir / f"{task}_{re.sub('[^a-zA-Z]+', '_', name)}_{rate:g}_{seed}"
    kept = workdir / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    run: Callable[..., dict[str, float]] = run_here if WAYS[name].where == "here" else run_there
    scores = run(task, WAYS[name], rate, seed, args, workdir)
    measured = {"task": task, "way": name, "learning_rate": rate, "seed": seed, **scores}
    workdir.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(measured) + "\n")
    print(f"  {task}, {name}, rate {rate:g}, seed {seed}: {measured['score']:.1f}", flush=True)
    return measured


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean of a way's seeds and its standard error."""
    scores = [run["score"] for run in runs]
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return {"learning_rate": runs[0]["learning_rate"], "scores": scores, "mean": statistics.mean(scores), "standard_error": error}


def main() -> None:
    """Runs all, prints the tables and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=OF_TASK, default=list(OF_TASK))
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "finetuning_peers.json")
    args = parser.parse_args()
    use_compile_cache()  # the seeds of a way run one program
    data = args.workdir / "data"
    if not (data / "rewriting" / "validation.jsonl").exists():
        write_tasks(data)
    results: dict[str, Any] = {"batch": BATCH, "tasks": {}}
    for task in args.tasks:
        sizes = {side: len(read_rows(data / task, side)) for side in ("train", "validation")}
        found: dict[str, Any] = {"steps": STEPS[task], "examples": sizes, "ways": {}, "runs": []}
        if task == "classification":
            counts = collections.Counter(row["label"] for row in read_rows(data / task, "validation"))
            found |= {"classes": dict(counts), "most_frequent_class": 100.0 * max(counts.values()) / sizes["validation"]}
        rates: dict[str, float] = {}
        for name in OF_TASK[task]:
            own_rate = not WAYS[name].rate_of
            trials = [run_of(task, name, rate, PICKING, args) for rate in RATES[task]] if own_rate else []
            rate = max(trials, key=lambda run: run["score"])["learning_rate"] if own_rate else rates[WAYS[name].rate_of]
            rates[name] = rate
            own = [run_of(task, name, rate, seed, args) for seed in SEEDS]
            found["runs"] += trials + own
            found["ways"][name] = summary(own)
        results["tasks"][task] = found
        print(f"{task}: {sizes}, guessing: {found.get('most_frequent_class', 0.0):.1f}")
        for name, way in found["ways"].items():
            each = " ".join(f"{score:.1f}" for score in way["scores"])
            print(f"  {name:24}{way['learning_rate']:8g}{each:>20}{way['mean']:8.2f} +- {way['standard_error']:.2f}")
    run_record.write(args.output, results)


if __name__ == "__main__":
    main()
