"""The end of a fine-tuning run: examples of predictions, the report, and where everything lies."""

from __future__ import annotations

import importlib.util
import json
import shlex

import jax
from etils import epath

from flax_switch.data.tasks import spread
from flax_switch.finetuning.evaluate import BEST, PREDICTIONS, best_of, describe, finetuning_config
from flax_switch.training.loop import RunResult
from flax_switch.training.metrics import read_metrics
from flax_switch.training.progress import console
from flax_switch.training.report import SAMPLES_FILE, write_report


def finish(result: RunResult, workdir: epath.PathLike) -> None:
    """Shows predictions of the best checkpoint, writes the report, and says what there is and what to try next."""
    if jax.process_index() != 0:
        return
    workdir, config = epath.Path(workdir), finetuning_config(result.run)
    history = {line["step"]: line for line in read_metrics(workdir) if line["kind"] == "eval" and config.best in line}
    if history:
        step, _ = best_of([(step, line[config.best]) for step, line in history.items()], config.best)
        samples = _samples(workdir / PREDICTIONS / f"step_{step}.jsonl", config.train.sample_spans)
        (workdir / SAMPLES_FILE).write_text(json.dumps(samples, indent=2) + "\n")
        for inputs, answer in (sample["pieces"] for sample in samples):
            shown = inputs if len(inputs) <= 300 else f"{inputs[:300]} ..."
            console.print(f"\n  {shown}\n  -> {answer['model']}\n  should be: {answer['text']}")
        console.print(f"\nBest by {config.best}, step {step}: {describe(config, history[step])}")
    if importlib.util.find_spec("matplotlib") is not None:
        console.print(f"\nReport, with plots:  {write_report(workdir)}")
    model = workdir / BEST if history else workdir
    quoted = shlex.quote(str(model))
    console.print(
        f"Metrics:             {workdir / 'metrics.jsonl'}\n"
        f"Predictions:         {workdir / PREDICTIONS}\n"
        f"Model:               {model}\n\n"
        f"Next: evaluate it on other examples, generate with it, or export it:\n"
        f"  flax-switch evaluate --checkpoint {quoted} --config.data.validation=test.jsonl\n"
        f"  flax-switch generate --checkpoint {quoted} --input texts.txt --num_beams 4\n"
        f"  flax-switch convert {quoted} exported --to huggingface"
    )


def _samples(path: epath.Path, count: int) -> list[dict[str, list]]:
    """Some predictions in the report's form: the inputs, then the model's text in place of the reference."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    chosen = [lines[i] for i in spread(lines, count)] if count else []
    return [{"pieces": [p["inputs"], {"model": p["prediction"], "text": p["references"][0]}]} for p in chosen]
