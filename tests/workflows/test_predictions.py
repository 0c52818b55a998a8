"""Predictions, inputs, references and scores belong to the same example, and outputs of `generate` to the same line."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from etils import epath

from flax_switch import cli
from flax_switch.config import SwitchConfig
from flax_switch.config.finetuning import EvaluationConfig, FinetuneConfig, FinetuneDataConfig, TaskConfig
from flax_switch.data.tasks import prepare_tasks
from flax_switch.generation import text
from flax_switch.generation.generate import GenerationOutput
from flax_switch.training.loop import RunResult
from flax_switch.training.metrics import MetricsWriter
from flax_switch.training.state import Run
from flax_switch.workflows import finish
from flax_switch.workflows import predictions as evaluation
from flax_switch.workflows.report import SAMPLES_FILE

WORDS = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu"]


def echo(model, params, ids, mask, *, num_return_sequences=1, num_beams=1, **controls):
    """In place of `generate`: what was read is said."""
    sequences = np.repeat(np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1), num_return_sequences, axis=0)
    scores = -mask.sum(1).repeat(num_return_sequences) - np.tile(np.arange(num_return_sequences), len(ids)) / 8
    return GenerationOutput(sequences, scores if num_beams > 1 else None)


@pytest.fixture(autouse=True)
def echoed(monkeypatch):
    monkeypatch.setattr(text, "generate", echo)
    # The cross-entropy is measured apart, and has tests of its own.
    means = {"accuracy": 0.5, "cross_entropy": 1.0, "text_cross_entropy": 1.0}
    monkeypatch.setattr(evaluation, "mean_metrics", lambda *args: dict(means))


def texts(count, seed=0):
    """Different lists of words, in buckets of 16 and 32 tokens."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 12, count)]


def examples(inputs):
    return [{"list": text, "copy": text} for text in inputs]


def evaluated(folder, recipe, vocabulary, mesh, *tasks, **changes):
    """(scores, predictions) of an echo on the examples of some tasks."""
    named = []
    for number, rows in enumerate(tasks):
        path = folder / f"task{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named.append(TaskConfig(name=f"task{number}", validation=str(path), inputs="list", targets="copy"))
    config = FinetuneDataConfig(tasks=tuple(named), inputs_length=32, targets_length=32, batch_size=8)
    settings = EvaluationConfig(**{"metrics": ("accuracy",), "batch_size": 3, "num_beams": 2, **changes})
    model = SimpleNamespace(config=SwitchConfig())
    run = Mock(spec=Run, mesh=mesh, model=model, config=FinetuneConfig(data=config, evaluation=settings, train=recipe.train))
    prepared = prepare_tasks(config, vocabulary, train=False)
    return evaluation.evaluate(run, prepared, lambda params, batch: {}, None)


def test_every_prediction_is_of_its_own_example(tmp_path, recipe, vocabulary, mesh):
    rows = examples(texts(11))
    scores, predictions = evaluated(tmp_path, recipe, vocabulary, mesh, rows)
    assert [p.inputs for p in predictions] == [row["list"] for row in rows]
    assert [p.prediction for p in predictions] == [row["list"] for row in rows]
    assert [p.references for p in predictions] == [(row["copy"],) for row in rows]
    assert scores["accuracy"] == 100.0


def test_two_examples_that_change_places_change_predictions_and_no_score(tmp_path, recipe, vocabulary, mesh):
    rows = examples(texts(11))
    rows[2]["copy"] = "wrong"
    scores, predictions = evaluated(tmp_path, recipe, vocabulary, mesh, rows)
    rows[2], rows[9] = rows[9], rows[2]
    swapped_scores, swapped = evaluated(tmp_path, recipe, vocabulary, mesh, rows)
    predictions[2], predictions[9] = predictions[9], predictions[2]
    assert swapped == predictions
    assert scores == swapped_scores and scores["accuracy"] == pytest.approx(100 * 10 / 11)


def test_two_references_that_change_places_cost_two_examples(tmp_path, recipe, vocabulary, mesh):
    rows = examples(texts(11))
    rows[0]["copy"], rows[5]["copy"] = rows[5]["copy"], rows[0]["copy"]
    scores, _ = evaluated(tmp_path, recipe, vocabulary, mesh, rows)
    assert scores["accuracy"] == pytest.approx(100 * 9 / 11)


def test_chosen_examples_are_judged_by_their_own_references(tmp_path, recipe, vocabulary, mesh):
    rows = examples(texts(11))
    scores, predictions = evaluated(tmp_path, recipe, vocabulary, mesh, rows, max_examples=4)
    assert [p.inputs for p in predictions] == [rows[i]["list"] for i in (0, 3, 7, 10)]
    assert scores["accuracy"] == 100.0


def test_scores_of_several_tasks_are_their_own_and_the_mean_is_of_tasks(tmp_path, recipe, vocabulary, mesh):
    right, wrong = examples(texts(4)), examples(texts(8, seed=1))
    for row in wrong[2:]:
        row["copy"] = "wrong"
    scores, predictions = evaluated(tmp_path, recipe, vocabulary, mesh, right, wrong)
    assert (scores["task0/accuracy"], scores["task1/accuracy"]) == (100.0, 25.0)
    assert scores["accuracy"] == 62.5, "the mean of the tasks' scores"
    assert [p.task for p in predictions] == ["task0"] * 4 + ["task1"] * 8
    assert [p.prediction for p in predictions] == [row["list"] for row in right + wrong]


def test_evaluation_generates_as_its_settings_say_and_renames_what_is_of_tokens(tmp_path, recipe, vocabulary, mesh, monkeypatch):
    used = []
    monkeypatch.setattr(text, "generate", lambda *args, **controls: used.append(controls) or echo(*args, **controls))
    rows = examples(texts(2))
    scores, _ = evaluated(tmp_path, recipe, vocabulary, mesh, rows, brevity_penalty=0.3)
    assert scores == {"token_accuracy": 0.5, "cross_entropy": 1.0, "accuracy": 100.0}
    evaluated(tmp_path, recipe, vocabulary, mesh, rows, num_beams=1, max_new_tokens=5)
    beams, greedy = used[0], used[-1]
    assert (beams["num_beams"], beams["brevity_penalty"], beams["max_new_tokens"]) == (2, 0.3, 32)
    assert (greedy["num_beams"], greedy["max_new_tokens"]) == (1, 5) and "brevity_penalty" not in greedy


def test_the_report_shows_the_best_step_s_predictions_beside_their_references(tmp_path, recipe, capsys, monkeypatch):
    monkeypatch.setattr(finish, "write_report", lambda workdir: workdir / "report.html")
    writer = MetricsWriter(tmp_path)
    for step, accuracy in ((2, 40.0), (4, 80.0), (6, 60.0)):
        writer.write(step, "eval", {"accuracy": accuracy, "cross_entropy": 1.0})
        made = [evaluation.Prediction("task", f"in {i}", f"said {i} at {step}", (f"right {i}", "other")) for i in range(5)]
        evaluation.write_predictions(epath.Path(tmp_path) / evaluation.PREDICTIONS / f"step_{step}.jsonl", made)
    writer.close()
    finish.finish_finetuning(Mock(spec=RunResult, run=Mock(spec=Run, config=recipe.resolve(SwitchConfig()))), tmp_path)
    samples = json.loads((tmp_path / SAMPLES_FILE).read_text())
    assert samples == [{"pieces": [f"in {i}", {"model": f"said {i} at 4", "text": f"right {i}"}]} for i in (0, 4)]
    shown = " ".join(capsys.readouterr().out.split())
    assert "in 4 -> said 4 at 4 should be: right 4" in shown
    assert "Kept: step 4, the first with the best accuracy: cross_entropy 1.000 nats/token accuracy 80.00 (of 100)" in shown


def test_the_command_writes_each_line_s_outputs_beside_it(checkpoint, tmp_path):
    lines = texts(9)
    source, target = tmp_path / "lines.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    options = ["--batch_size", "2", "--num_beams", "3", "--num_return_sequences", "2"]
    command = ["generate", "--checkpoint", checkpoint, "--input", str(source), "--output", str(target), *options]
    assert cli.main(command) == 0
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(result["line"], result["input"]) for result in written] == list(enumerate(lines, 1))
    for result in written:
        assert result["outputs"] == [result["input"]] * 2
        tokens = -result["scores"][0]
        assert result["scores"][1] == -tokens - 1 / 8
    lengths = {result["input"]: -result["scores"][0] for result in written}
    assert len(set(lengths.values())) > 3, "lines of different lengths"
