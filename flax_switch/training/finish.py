"""The end of a run: a few masked spans filled in as text, the report, and where everything lies."""

import importlib.util
import itertools
import json
import shlex
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_switch.data import Prepared, Vocabulary
from flax_switch.generation import generate
from flax_switch.training.evaluate import describe
from flax_switch.training.loop import RunResult
from flax_switch.training.progress import console
from flax_switch.training.report import SAMPLES_FILE, write_report


def finish(result: RunResult, workdir: epath.PathLike) -> None:
    """Fills masked spans of held-out text, writes the report, and tells the person what there is and what to try next."""
    if jax.process_index() != 0:
        return  # one process writes
    workdir = epath.Path(workdir)
    # Generating is a program of all processes where the parameters are spread over them; here is only one.
    samples = fill_spans(result, result.run.config.train.sample_spans) if jax.process_count() == 1 else []
    (workdir / SAMPLES_FILE).write_text(json.dumps(samples, indent=2) + "\n")
    if samples:
        console.print("\nHeld-out text with masked spans filled in, [model's -> text's]:")
    for sample in samples:
        shown = (p if isinstance(p, str) else f"[{p['model']} -> {p['text']}]" for p in sample["pieces"])
        console.print("  " + " ".join(shown))
    if result.evaluation is not None:
        console.print(f"\n{describe(result.evaluation)}")
    if importlib.util.find_spec("matplotlib") is not None:
        console.print(f"\nReport, with plots:  {write_report(workdir)}")
    else:
        console.print("\nFor plots: pip install 'flax_switch[plots]', then flax-switch report " + shlex.quote(str(workdir)))
    console.print(
        f"Metrics:             {workdir / 'metrics.jsonl'}\n"
        f"Checkpoints:         {workdir / 'checkpoints'}\n"
        f"Vocabulary:          {workdir / 'vocabulary'}\n\n"
        f"Next: train on with --config.train.steps=..., on your own text with --config.data.source=TEXT.txt and a new --workdir,\n"
        f"compare with a dense model of equal FLOPs with --config t5_tiny, or generate:\n"
        f"  echo 'Return the <extra_id_0> of the list.' | flax-switch generate --checkpoint {workdir}"
    )
    sys.stdout.flush()


def fill_spans(result: RunResult, count: int) -> list[dict[str, Any]]:
    """Greedy predictions for the masked spans of `count` held-out examples, beside the text that was there.

    Each sample is {"pieces": [text, {"model": ..., "text": ...}, text, ...]} in the order of the source.
    """
    config, vocabulary = result.run.config, result.prepared.vocabulary
    assert isinstance(result.prepared, Prepared)  # of pre-training
    batch = next(iter(result.prepared.heldout_batches(1)))
    spans = [i for i, row in enumerate(batch["input_ids"]) if (row >= vocabulary.num_pieces).any()][:count]
    if not spans:
        return []
    inputs, masks, labels = (np.asarray(batch[name])[spans] for name in ("input_ids", "attention_mask", "labels"))
    output = generate(result.run.model, result.state.params, inputs, masks, max_new_tokens=config.data.targets_length, num_beams=1)
    rows = zip(inputs, np.asarray(output.sequences), labels, strict=True)
    return [{"pieces": _pieces(vocabulary, source, predicted, target)} for source, predicted, target in rows]


def _pieces(vocabulary: Vocabulary, source: np.ndarray, predicted: np.ndarray, target: np.ndarray) -> list[Any]:
    model, text = _by_sentinel(vocabulary, predicted), _by_sentinel(vocabulary, target)
    pieces: list[Any] = []
    for special, ids in itertools.groupby(source.tolist(), key=lambda i: i >= vocabulary.num_pieces):
        for group in [[i] for i in ids] if special else [list(ids)]:
            if special:
                pieces.append({"model": model.get(group[0], ""), "text": text.get(group[0], "")})
            elif decoded := vocabulary.decode(group):
                pieces.append(decoded)
    return pieces


def _by_sentinel(vocabulary: Vocabulary, ids: np.ndarray) -> dict[int, str]:
    """The text behind each sentinel of a target."""
    spans: dict[int, list[int]] = {}
    current = None
    for i in ids.tolist():
        if i >= vocabulary.num_pieces:
            current = spans.setdefault(i, [])
        elif i > vocabulary.unk_id and current is not None:
            current.append(i)
    return {sentinel: vocabulary.decode(span) for sentinel, span in spans.items()}
