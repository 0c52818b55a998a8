"""What a pre-trained model loses in each form of its weights: held-out cross-entropy, and how often its likeliest token stays.

    python benchmarks/weights_quality.py runs/tiny

The tokens are those of the run's held-out batches, under the true prefix, whichever objective they are of.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import run_record

import flax_switch as fs
from flax_switch.config import ExperimentConfig
from flax_switch.data.pipeline import prepare

FORMS = ("float32", "bfloat16", "int8", "int4")


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


def main() -> None:
    """Prints a row for each form and writes all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a pre-training run")
    parser.add_argument("--batches", type=int, default=12, help="held-out batches")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weights_quality.json"))
    args = parser.parse_args()
    config = ExperimentConfig.from_dict(json.loads((args.run / "config.json").read_text("utf-8")))
    batches = list(prepare(config.data, workdir=args.run, quiet=True).heldout_batches(args.batches))
    model = fs.load_pretrained(str(args.run))
    (loss, tokens), rows = heldout(model, batches), []
    print("weights   nats a token   of float32's   likeliest token the same")
    for form in FORMS:
        rounded, said = heldout(model if form == "float32" else fs.quantize(model, form), batches)
        rows.append(dict(weights=form, loss=rounded, more=rounded / loss - 1, same_token=float(np.mean(said == tokens))))
        print(f"{form:8} {rounded:13.4f} {rows[-1]['more']:+14.3%} {rows[-1]['same_token']:26.2%}", flush=True)
    run_record.write(args.output, dict(model=str(config.model), tokens=len(tokens), rows=rows))


if __name__ == "__main__":
    main()
