"""What a pre-trained model loses in each form of its weights: held-out cross-entropy, and how often its likeliest token stays.

    python benchmarks/weights_quality.py runs/tiny
    python benchmarks/weights_quality.py runs/translation --examples data/debian/translation/en-it/synopses/test.jsonl \\
        --calibration data/debian/translation/en-it/synopses/train.jsonl --field en

The tokens are those of the run's held-out batches, under the true prefix, whichever objective they are of. Of a fine-tuned run the
task's own scores on a file's examples count, such as BLEU of what is generated, and the loss over their targets. With --calibration
int4 comes once more, rounded for the first --texts lines of a file, of JSON lines those under --field.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import run_record

import flax_switch as fs
from flax_switch.config import ExperimentConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.data.pipeline import prepare
from flax_switch.generation.text import read_lines
from flax_switch.training.checkpoint import read_config
from flax_switch.workflows.calibrate import convert_calibrated
from flax_switch.workflows.finetune import evaluate_checkpoint, recipe_of

FORMS = ("float32", "bfloat16", "int8", "int4")
CALIBRATED = "int4 by texts"


def heldout(pretrained: fs.Pretrained, batches: list[dict[str, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Returns nats a token over the batches' labels, and the likeliest token at each of them."""

    @jax.jit
    def forward(params, batch):
        segments = dict(segment_ids=batch.get("input_segment_ids"), decoder_segment_ids=batch.get("decoder_segment_ids"))
        masks = {name: batch[name] for name in ("attention_mask", "decoder_attention_mask")}
        ids = {name: batch[name] for name in ("input_ids", "decoder_input_ids")}
        return pretrained.model.apply({"params": params}, **ids, **masks, **segments).logits

    loss, tokens = 0.0, []
    for batch in batches:
        logits, counted = np.float64(forward(pretrained.params, batch)), batch["labels"] >= 0
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        loss -= np.take_along_axis(log_probs, np.maximum(batch["labels"], 0)[..., None], -1)[..., 0][counted].sum()
        tokens.append(logits.argmax(-1)[counted])
    return loss / sum(map(len, tokens)), np.concatenate(tokens)


def scores(run: Path, examples: Path, limit: int | None, texts: list[str]) -> dict:
    """Prints and returns each form's scores on a file of examples, greedily generated, and the share of outputs as in float32."""
    config = read_config(run)
    assert isinstance(config, FinetuneConfig), f"{run} is no fine-tuned run"
    recipe = recipe_of(config)
    recipe = recipe.replace(
        data=recipe.data.replace(validation=(str(examples),)),
        evaluation=recipe.evaluation.replace(max_examples=limit),
        train=recipe.train.replace(eval_batches=10**6),
    )
    rows, said = [], {}
    for form in (*FORMS, *([CALIBRATED] if texts else [])):
        with tempfile.TemporaryDirectory() as folder:
            if form == CALIBRATED:
                checkpoint = str(convert_calibrated(run, f"{folder}/small", texts, to="flax_switch", changes=dict(weights="int4")))
                _, found, predictions = evaluate_checkpoint(recipe, checkpoint)
            else:
                changes = {} if form == "float32" else dict(weights=form)
                _, found, predictions = evaluate_checkpoint(recipe, str(run), changes=changes)
        said[form] = [prediction.prediction for prediction in predictions]
        same = float(np.mean([a == b for a, b in zip(said[form], said["float32"], strict=True)]))
        numbers = {name: value for name, value in found.items() if isinstance(value, float)}
        rows.append(dict(weights=form, **numbers, same_output=same))
        print(f"{form:13} the same output {same:7.2%}  {numbers}", flush=True)
    return dict(model=str(config.model), examples=len(said["float32"]), rows=rows)


def main() -> None:
    """Prints a row for each form and writes all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--batches", type=int, default=12, help="held-out batches of a pre-training run")
    parser.add_argument("--examples", type=Path, help="a file of them, for a fine-tuned run")
    parser.add_argument("--max-examples", type=int, help="how many of them; by default all")
    parser.add_argument("--calibration", type=Path, help="texts for int4, a line each or JSON lines")
    parser.add_argument("--field", default="text", help="of the calibration's JSON lines")
    parser.add_argument("--texts", type=int, default=512, help="how many of them")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    texts: list[str] = []
    if args.calibration:
        with args.calibration.open("rb") as file:
            texts = [line.text for line in read_lines(itertools.islice(file, args.texts), args.field)]
    if args.examples:
        found, name = scores(args.run, args.examples, args.max_examples, texts), "weights_quality_task.json"
    else:
        found, name = losses(args.run, args.batches, texts), "weights_quality.json"
    run_record.write(args.output or run_record.RESULTS / name, found)


def losses(run: Path, number: int, texts: list[str]) -> dict:
    """Prints and returns each form's loss over a pre-training run's held-out batches."""
    config = ExperimentConfig.from_dict(json.loads((run / "config.json").read_text("utf-8")))
    batches = list(prepare(config.data, workdir=run, quiet=True).heldout_batches(number))
    model = fs.load_pretrained(str(run))
    (loss, tokens), rows = heldout(model, batches), []
    print("weights        nats a token   of float32's   likeliest token the same")
    for form in (*FORMS, *([CALIBRATED] if texts else [])):
        changed = (
            model if form == "float32" else fs.quantize(model, form.split()[0], calibration=texts if form == CALIBRATED else None)
        )
        rounded, said = heldout(changed, batches)
        rows.append(dict(weights=form, loss=rounded, more=rounded / loss - 1, same_token=float(np.mean(said == tokens))))
        print(f"{form:13} {rounded:13.4f} {rows[-1]['more']:+14.3%} {rows[-1]['same_token']:26.2%}", flush=True)
    return dict(model=str(config.model), tokens=len(tokens), rows=rows)


if __name__ == "__main__":
    main()
