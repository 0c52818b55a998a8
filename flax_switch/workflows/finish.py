"""The end of a run: spans filled in or predictions as text, the report, and where everything lies."""

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.data import Prepared, Vocabulary
from flax_switch.data.batches import IGNORED, Batch
from flax_switch.data.tasks import spread
from flax_switch.generation.generate import generate
from flax_switch.host.files import write_text
from flax_switch.host.json_text import json_object
from flax_switch.training.findings import findings
from flax_switch.training.loop import RunResult
from flax_switch.training.metrics import read_metrics
from flax_switch.training.progress import console
from flax_switch.workflows.predictions import BEST, PREDICTIONS, best_of, finetuning_config
from flax_switch.workflows.predictions import describe as describe_scores
from flax_switch.workflows.report import SAMPLES_FILE, write_report

LONGEST = 300  # characters of a sample's text that are shown


def finish(result: RunResult, workdir: epath.PathLike) -> None:
    """Fills masked spans of held-out text, writes the report, and tells the person what there is and what to try next."""
    workdir = epath.Path(workdir)
    alone = result.run.config.model.decoder_only
    show = continue_text if alone else fill_spans
    samples = show(result, result.run.config.train.sample_spans)  # a program of all processes
    if jax.process_index() != 0:
        return  # one process writes
    write_text(workdir / SAMPLES_FILE, json.dumps(samples, indent=2) + "\n")
    if samples:
        done = "continued" if alone else "with its gaps filled in"
        console.print(f"\nHeld-out text {done}; in brackets what the model wrote -> what was there:")
    for sample in samples:
        _show(sample["pieces"], whole="<extra_id_" in sample["pieces"][0])
    if result.evaluation is not None:
        for finding in findings(result.run.config.model, result.evaluation):
            console.print(f"\n{finding}", style="yellow")
    line = "Returns True if the" if alone else "Returns True if the <extra_id_0> is empty."
    dense = "--config.model.num_sparse_decoder_layers=0 and a new --workdir" if alone else "--config t5_tiny and a new --workdir"
    console.print(
        f"\nReport, a page:      {write_report(workdir)}\n"
        f"Model:               {workdir} (for --checkpoint and --init)\n"
        f"Metrics:             {workdir / 'metrics.jsonl'}\n"
        f"Checkpoints:         {workdir / 'checkpoints'}\n"
        f"Vocabulary:          {workdir / 'vocabulary'}\n\n"
        f"Next, generate with it:\n"
        f"  echo '{line}' | flax-switch generate --checkpoint {workdir} --num-beams 4\n"
        f"or give the same command\n"
        f"  --config.train.steps={2 * result.run.config.train.steps} to go on until so many steps in all\n"
        "  --config.data.source=TEXT.txt and a new --workdir for text of your own\n"
        f"  {dense} for a dense model with as much arithmetic a token"
    )
    sys.stdout.flush()


def _show(pieces: Sequence[Any], *, whole: bool) -> None:
    """Prints a sample: gaps in their places, or (`whole`) what the model wrote and what was there below the inputs."""
    if whole:
        console.print(f"\n  {_cut(pieces[0])}\n  -> {_cut(pieces[1]['model'])}\n  should be: {_cut(pieces[1]['text'])}")
    else:
        console.print("\n  " + " ".join(p if isinstance(p, str) else f"[{p['model']} -> {p['text']}]" for p in pieces))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def fill_spans(result: RunResult, count: int) -> list[dict[str, Any]]:
    """Returns greedy predictions for the masked spans of `count` held-out examples, beside the text that was there.

    Each sample is {"pieces": [text, {"model": ..., "text": ...}, text, ...]} in the order of the source.
    """
    config, vocabulary = result.run.config, result.prepared.vocabulary
    assert isinstance(result.prepared, Prepared)  # of pre-training
    batch = first_documents(next(iter(result.prepared.heldout_batches(1))))
    masked, spelled = ((np.asarray(batch[name]) >= vocabulary.num_pieces).any(1) for name in ("input_ids", "labels"))
    whole = np.flatnonzero(masked & ~spelled)  # of infilling; a sentence says more than its gaps
    spans = (whole if len(whole) else np.flatnonzero(masked))[:count]
    if not len(spans):
        return []
    inputs, masks, labels = (np.asarray(batch[name])[spans] for name in ("input_ids", "attention_mask", "labels"))
    output = generate(result.run.model, result.state.params, inputs, masks, max_new_tokens=config.data.targets_length, num_beams=1)
    rows = zip(inputs, np.asarray(output.sequences), labels, strict=True)
    return [{"pieces": _pieces(vocabulary, source, predicted, target)} for source, predicted, target in rows]


def continue_text(result: RunResult, count: int) -> list[dict[str, Any]]:
    """Returns the greedy continuations of `count` held-out examples' inputs, or of their first half where they have none."""
    vocabulary, config = result.prepared.vocabulary, result.run.config
    assert isinstance(result.prepared, Prepared)  # of pre-training
    batch = next(iter(result.prepared.heldout_batches(1)))
    ids, given, real = (np.asarray(batch[name]) for name in ("decoder_input_ids", "prefix_mask", "decoder_attention_mask"))
    first = np.asarray(batch.get("decoder_segment_ids", real)) == 1
    rows = np.flatnonzero(first.sum(1) >= 4)[:count]
    if not len(rows):
        return []
    texts = [ids[row, first[row]].tolist() for row in rows]
    inputs_of = [int(given[row, first[row]].sum()) for row in rows]  # the start token among them
    cuts = [inputs if inputs > 1 else len(text) // 2 for inputs, text in zip(inputs_of, texts, strict=True)]
    inputs, mask = np.zeros((2, len(rows), max(cuts)), np.int32)
    for row, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
        inputs[row, :cut], mask[row, :cut] = text[:cut], 1
    new = min(config.data.targets_length, max(map(len, texts)))
    output = generate(result.run.model, result.state.params, inputs, mask, max_new_tokens=new, num_beams=1)
    written = np.asarray(output.sequences)[:, inputs.shape[1] + 1 :]
    said = lambda ids: vocabulary.decode([i for i in ids if i > vocabulary.eos_id], skip_special_tokens=False)  # noqa: E731
    return [
        {"pieces": [said(text[:cut]), {"model": said(made.tolist()), "text": said(text[cut:])}]}
        for text, cut, made in zip(texts, cuts, written, strict=True)
    ]


def first_documents(batch: Batch) -> Batch:
    """Returns a batch with the first example of each row alone, where rows are packed."""
    if "input_segment_ids" not in batch:
        return batch
    inputs, targets = batch["input_segment_ids"] == 1, batch["decoder_segment_ids"] == 1
    return {
        "input_ids": np.where(inputs, batch["input_ids"], 0),
        "attention_mask": inputs.astype(np.int32),
        "labels": np.where(targets, batch["labels"], IGNORED),
    }


def _pieces(vocabulary: Vocabulary, source: np.ndarray, predicted: np.ndarray, target: np.ndarray) -> list[Any]:
    if (target >= vocabulary.num_pieces).any():  # spans are spelled out behind their sentinels
        model, text = _by_sentinel(vocabulary, predicted), _by_sentinel(vocabulary, target)
    else:
        model, text = (_fills(vocabulary, source, ids) for ids in (predicted, target))
    if model is None or text is None:  # what the source shows did not come back: show all of it
        return [
            vocabulary.decode(source[source > vocabulary.eos_id], skip_special_tokens=False),
            *_whole(vocabulary, predicted, target),
        ]
    pieces: list[Any] = []
    for special, ids in itertools.groupby(source.tolist(), key=lambda i: i >= vocabulary.num_pieces):
        for group in [[i] for i in ids] if special else [list(ids)]:
            if special:
                pieces.append({"model": model.get(group[0], ""), "text": text.get(group[0], "")})
            elif decoded := vocabulary.decode(group):
                pieces.append(decoded)
    return pieces


def _whole(vocabulary: Vocabulary, predicted: np.ndarray, target: np.ndarray) -> list[dict[str, str]]:
    model, text = (vocabulary.decode([i for i in ids.tolist() if i > vocabulary.unk_id]) for ids in (predicted, target))
    return [{"model": model, "text": text}]


def _fills(vocabulary: Vocabulary, source: np.ndarray, ids: np.ndarray) -> dict[int, str] | None:
    """Returns the text for each sentinel of a source out of the whole text; None where that does not hold what the source shows."""
    text = [i for i in ids.tolist() if i > vocabulary.eos_id]
    fills: dict[int, list[int]] = {}
    place = 0
    for sentinel, piece in _shown(vocabulary, source):
        found = _find(text, piece, place) if piece else len(text)
        if found is None or (sentinel is None and found != 0):
            return None
        if sentinel is not None:
            fills[sentinel] = text[place:found]
        place = found + len(piece)
    return {sentinel: vocabulary.decode(fill) for sentinel, fill in fills.items()} if place == len(text) else None


def _shown(vocabulary: Vocabulary, source: np.ndarray) -> list[tuple[int | None, list[int]]]:
    """Returns the shown pieces of a source, each with the sentinel before it; the first may have none."""
    pieces: list[tuple[int | None, list[int]]] = [(None, [])]
    for i in source.tolist():
        if i >= vocabulary.num_pieces:
            pieces.append((i, []))
        elif i > vocabulary.eos_id:
            pieces[-1][1].append(i)
    return pieces if pieces[0][1] else pieces[1:]


def _find(text: list[int], piece: list[int], start: int) -> int | None:
    """Returns where `piece` first stands in `text` from `start` on; None where it does not."""
    places = (i for i in range(start, len(text) - len(piece) + 1) if text[i : i + len(piece)] == piece)
    return next(places, None)


def _by_sentinel(vocabulary: Vocabulary, ids: np.ndarray) -> dict[int, str]:
    """Returns the text behind each sentinel of a target."""
    spans: dict[int, list[int]] = {}
    current = None
    for i in ids.tolist():
        if i >= vocabulary.num_pieces:
            current = spans.setdefault(i, [])
        elif i > vocabulary.unk_id and current is not None:
            current.append(i)
    return {sentinel: vocabulary.decode(span) for sentinel, span in spans.items()}


def finish_finetuning(result: RunResult, workdir: epath.PathLike) -> None:
    """Shows predictions of the best checkpoint, writes the report, and says what there is and what to try next."""
    if jax.process_index() != 0:
        return
    workdir, config = epath.Path(workdir), finetuning_config(result.run)
    history = {line["step"]: line for line in read_metrics(workdir) if line["kind"] == "eval" and config.best in line}
    if history:
        step, _ = best_of([(step, line[config.best]) for step, line in history.items()], config.best)
        samples = _predictions(workdir / PREDICTIONS / f"step_{step}.jsonl", config.train.sample_spans)
        write_text(workdir / SAMPLES_FILE, json.dumps(samples, indent=2) + "\n")
        if samples:
            console.print(f"\n{len(samples)} of the validation examples: the input, what the model wrote, and what it should be.")
        for sample in samples:
            _show(sample["pieces"], whole=True)
        console.print(f"\nKept: step {step}, the first with the best {config.best}: {describe_scores(config, history[step])}")
    model = workdir / BEST if history else workdir
    quoted = shlex.quote(str(model))
    prefix = f" --prefix={shlex.quote(next(filter(None, config.prefixes)))}" if len(config.prefixes) > 1 else ""
    console.print(
        f"\nReport, a page:      {write_report(workdir)}\n"
        f"Metrics:             {workdir / 'metrics.jsonl'}\n"
        f"Predictions:         {workdir / PREDICTIONS}\n"
        f"{'Adapter:' if config.adapter.rank else 'Model:  '}             {model}\n\n"
        f"{_next_commands(config, quoted, prefix)}"
    )


_CALLS = {
    "classification": "classify", "multi_label_classification": "label", "regression": "regress", "token_classification": "tag",
    "question_answering": "answer",
}  # fmt: skip


def _next_commands(config: FinetuneConfig, model: str, prefix: str) -> str:
    if config.model.head != LANGUAGE_MODEL and config.adapter.rank:  # no head has one but the mean of the encoder's states
        base = shlex.quote(config.init)
        return (
            "Next: use the adapter, export it for PEFT, or make one model of both:\n"
            f"  fs.load_pretrained({config.init!r}).with_adapter({model!r}).embed(...)\n"
            f"  flax-switch convert {model} exported --base {base} --to huggingface\n"
            f"  flax-switch convert {model} merged --base {base} --merge --to flax_switch"
        )
    if config.model.head != LANGUAGE_MODEL:
        return (
            "Next: evaluate it on other examples, or use it:\n"
            f"  flax-switch evaluate --checkpoint {model} --config.data.validation=TEST_FILE  # with the same columns\n"
            f"  fs.load_pretrained({model!r}).{_CALLS.get(config.model.head, 'embed')}(...)"
        )
    if config.adapter.rank:
        base = shlex.quote(config.init)
        return (
            "Next: generate with the adapter, export it for PEFT, or make one model of both:\n"
            f"  flax-switch generate --checkpoint {base} --adapter {model} --input texts.txt --num-beams 4{prefix}\n"
            f"  flax-switch convert {model} exported --base {base} --to huggingface\n"
            f"  flax-switch convert {model} merged --base {base} --merge --to flax_switch"
        )
    return (
        "Next: evaluate it on other examples, generate with it, or export it:\n"
        f"  flax-switch evaluate --checkpoint {model} --config.data.validation=TEST_FILE  # with the same columns\n"
        f"  flax-switch generate --checkpoint {model} --input texts.txt --num-beams 4{prefix}\n"
        f"  flax-switch convert {model} exported --to huggingface"
    )


def _predictions(path: epath.Path, count: int) -> list[dict[str, list]]:
    """Some predictions in the report's form: the inputs, then the model's text in place of the reference."""
    lines = [json_object(line, str(path)) for line in path.read_text().splitlines()] if path.exists() else []
    chosen = [lines[i] for i in spread(lines, count)] if count else []
    return [{"pieces": [p["inputs"], {"model": p["prediction"], "text": p["references"][0]}]} for p in chosen]
