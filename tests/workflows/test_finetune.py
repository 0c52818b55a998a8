"""Fine-tuning runs: they resume exactly, keep the best checkpoint, stop early, leave frozen parameters be, and can be opened."""

import dataclasses
import json
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from flax_switch import cli
from flax_switch.config import ConfigError, MeshConfig, SwitchConfig
from flax_switch.config.finetuning import EvaluationConfig, FinetuneConfig
from flax_switch.config.recipes import to_config_dict
from flax_switch.convert import convert
from flax_switch.data.tasks import PreparedTasks
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import load_pretrained
from flax_switch.training.metrics import MetricsWriter, read_metrics
from flax_switch.training.state import Run
from flax_switch.workflows.finetune import evaluate_checkpoint, finetune
from flax_switch.workflows.predictions import BEST, PREDICTIONS, TaskEvaluator, best_of
from flax_switch.workflows.start import open_start


def lines_of(workdir):
    """Everything that was computed, by step; rates of speed left out."""
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def one_device(mesh):
    """The commands, too, use one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax_switch.workflows.finetune.create_mesh", lambda config: mesh)
        yield


@pytest.fixture(scope="module")
def command(recipe, checkpoint, tmp_path_factory):
    """The command line of a run that moves so little that its scores stay as they are: patience ends it at step 4 of 8."""
    changed = recipe.replace(
        optimizer=recipe.optimizer.replace(learning_rate=1e-5, trainable="all_but_experts"),
        evaluation=recipe.evaluation.replace(patience=1),
        train=recipe.train.replace(steps=8, keep_last=5),
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({to_config_dict(changed).to_dict()!r}, convert_dict=True)\n"
    )
    return ["finetune", "--config", str(path), "--init", checkpoint]


@pytest.fixture(scope="module")
def run(command, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert cli.main([*command, "--workdir", str(workdir)]) == 0
    return workdir


def test_a_run_leaves_scores_predictions_the_best_model_and_a_report(run, vocabulary):
    evaluations = [line for line in lines_of(run) if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [2, 4]  # patience ended it
    assert {"accuracy", "cross_entropy", "token_accuracy"} <= evaluations[-1].keys()
    predictions = [json.loads(line) for line in (run / PREDICTIONS / "step_4.jsonl").read_text().splitlines()]
    assert len(predictions) == 6 and predictions[0].keys() == {"task", "inputs", "prediction", "references"}
    assert predictions[0]["inputs"].startswith("first: ")
    (task,) = json.loads((run / "tasks.json").read_text())
    assert task["train"]["examples"] == 80 and task["validation"]["examples"] == 6
    assert (run / "report.html").stat().st_size > 10_000
    best = load_pretrained(run / BEST)
    assert best.vocabulary.fingerprint == vocabulary.fingerprint
    assert load_pretrained(run).config == best.config


def test_frozen_parameters_are_to_the_bit_those_of_the_checkpoint(run, checkpoint):
    before, after = (flatten_dict(load_pretrained(path).params, sep="/") for path in (checkpoint, run))
    for path, value in after.items():
        assert np.array_equal(value, before[path]) == ("/expert/" in path), path


def test_a_killed_run_continues_with_the_losses_it_would_have_had(run, command, one_device, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert cli.main([*command, "--workdir", str(again)]) == 0
    assert lines_of(again) == lines_of(run)
    assert "from step 2" in capsys.readouterr().out
    for a, b in zip(*(flatten_dict(load_pretrained(w).params).values() for w in (run, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluate_prints_and_writes_what_the_run_measured(run, one_device, tmp_path, capsys):
    output = tmp_path / "scores"
    assert cli.main(["evaluate", "--checkpoint", str(run / BEST), "--output", str(output)]) == 0
    scores = json.loads((output / "metrics.json").read_text())
    measured = lines_of(run)
    expected = next(line for line in measured if line["kind"] == "eval" and line["step"] == 2)
    assert scores["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-6)
    assert scores["accuracy"] == expected["accuracy"]
    assert f"accuracy {scores['accuracy']:.2f}" in capsys.readouterr().out
    assert (output / "predictions.jsonl").read_text() == (run / PREDICTIONS / "step_2.jsonl").read_text()


def test_evaluation_without_an_example_asks_for_a_validation_or_test_file(run, one_device, tmp_path, capsys):
    none = ["--config.data.validation=None", "--config.data.validation_fraction=0"]
    assert cli.main(["evaluate", "--checkpoint", str(run / BEST), "--output", str(tmp_path), *none]) == 2
    assert "nothing to evaluate on; name a validation or test file with data.validation=FILE." in capsys.readouterr().err


def test_the_result_is_exported_to_hugging_face(run, tmp_path):
    assert cli.main(["convert", str(run / BEST), str(tmp_path / "hf"), "--to", "huggingface", "--no-progress"]) == 0
    ours, theirs = (flatten_dict(load_pretrained(path).params) for path in (run / BEST, tmp_path / "hf"))
    for key, value in ours.items():
        np.testing.assert_array_equal(theirs[key], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.train=none.jsonl"], "data.train: 'none.jsonl' is no file or folder"),
        (["--config.data.targets=frist"], "there is no field 'frist'; the fields are: list, first"),
        (["--config.evaluation.metrics=('rogue',)"], "Did you mean 'rouge'"),
        (["--config.evaluation.best=bleu"], "evaluation.best must be one of 'accuracy', 'cross_entropy'"),
        (["--config.model.droput_rate=0.1"], "Did you mean 'dropout_rate'"),
        (["--config.optimizer.trainable=ruoter"], "matches no parameter"),
        (["--init", "nowhere"], "--init nowhere: "),
        (["--init", "random:switch-tinny"], "Did you mean random:switch-tiny?"),
        (["--init", "random:switch-tiny"], "comes without a vocabulary; name one with --vocabulary"),
        (["--config", "configs/tiny.py"], "is a recipe for flax-switch pretrain"),
    ],
)
def test_mistakes_are_one_clear_message_before_training_begins(arguments, message, command, one_device, tmp_path, capsys):
    assert cli.main([*command, "--workdir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_pre_training_refuses_a_recipe_for_fine_tuning(tmp_path, capsys):
    assert cli.main(["pretrain", "--config", "configs/finetune_translation.py", "--workdir", str(tmp_path / "run")]) == 2
    assert "is a recipe for flax-switch finetune" in capsys.readouterr().err


def test_random_parameters_have_the_checkpoints_shape_and_vocabulary(checkpoint, vocabulary):
    start = open_start(f"random:{checkpoint}", {"dropout_rate": 0.2})
    assert start.source is None and start.vocabulary.fingerprint == vocabulary.fingerprint
    assert start.config.dropout_rate == 0.2 and start.config.d_model == 16
    preset = open_start("random:switch-tiny", {}, vocabulary=checkpoint)
    assert preset.config.d_model == 128 and preset.vocabulary.fingerprint == vocabulary.fingerprint
    with pytest.raises(ConfigError, match="holds no spiece.model"):
        open_start("random:switch-tiny", {}, vocabulary="configs")


def test_the_best_is_the_first_of_the_highest_scores_or_of_the_lowest_losses():
    history = [(2, 1.0), (4, 3.0), (6, 3.0), (8, 2.0)]
    assert best_of(history, "rougeL") == (4, 3.0)
    assert best_of(history, "cross_entropy") == (2, 1.0)


def test_patience_counts_evaluations_since_the_best_also_after_resuming(tmp_path):
    config = FinetuneConfig(model=SwitchConfig(), evaluation=EvaluationConfig(patience=2))
    run, prepared = Mock(spec=Run, config=config), Mock(spec=PreparedTasks, num_validation=1)
    writer = MetricsWriter(tmp_path)
    ends = []
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0)):
        writer.write(step, "eval", {"cross_entropy": loss})
        ends.append(TaskEvaluator(run, prepared, lambda params, batch: {}, epath.Path(tmp_path)).conclude(step, None, None))
    writer.close()
    assert ends[:3] == [None] * 3
    assert ends[3] == "cross_entropy has not improved on its 2.000 of step 4 in 2 evaluations"


@pytest.mark.slow
def test_a_run_on_several_devices_measures_what_one_device_measures(recipe, checkpoint, mesh, tmp_path):
    split = create_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])
    packed = recipe.replace(data=recipe.data.replace(packing=True))
    for name, devices in (("one", mesh), ("four", split)):
        finetune(packed, tmp_path / name, init=checkpoint, mesh=devices)
    one, four = (lines_of(tmp_path / name) for name in ("one", "four"))
    assert [line["step"] for line in one] == [line["step"] for line in four]
    for a, b in zip(one, four, strict=True):
        for key in {"loss", "cross_entropy", "accuracy"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    assert (tmp_path / "four" / BEST / "flax_switch.json").is_file()


@pytest.mark.slow
def test_a_run_learns_the_task_and_the_kept_checkpoint_has_its_best_score(recipe, checkpoint, mesh, tmp_path):
    longer = recipe.replace(train=recipe.train.replace(steps=300, eval_every=100, log_every=50, checkpoint_every=300))
    longer = longer.replace(evaluation=longer.evaluation.replace(num_beams=2))
    result = finetune(longer, tmp_path / "run", init=checkpoint, mesh=mesh)
    history = [(line["step"], line["accuracy"]) for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert result.finished and best_of(history, "accuracy")[1] >= 80
    _, scores, predictions = evaluate_checkpoint(longer, str(tmp_path / "run" / BEST), mesh=mesh)
    assert scores["accuracy"] == best_of(history, "accuracy")[1]
    right = sum(p.prediction.strip() in p.references for p in predictions)
    assert scores["accuracy"] == pytest.approx(100 * right / len(predictions))


def test_with_experts_on_disk_and_in_another_form_a_checkpoint_scores_what_it_does_in_memory(checkpoint, recipe, mesh, capsys):
    wanted = evaluate_checkpoint(recipe, checkpoint, mesh=mesh)[1:]
    assert evaluate_checkpoint(recipe, checkpoint, mesh=mesh, experts="disk", expert_memory="1MB")[1:] == wanted
    assert "Experts from disk: of " in capsys.readouterr().out
    in_memory, on_disk = (
        evaluate_checkpoint(recipe, checkpoint, mesh=mesh, changes={"weights": "int8"}, **loading)[1:]
        for loading in ({}, dict(experts="disk"))
    )
    assert in_memory == on_disk and in_memory != wanted
    with pytest.raises(ConfigError, match="serves one device, and this mesh has 8"):
        evaluate_checkpoint(recipe, checkpoint, mesh=create_mesh(recipe.mesh), experts="disk")


def test_a_quantised_checkpoint_is_evaluated_and_quantising_on_the_way_scores_the_same(checkpoint, tmp_path, recipe, mesh):
    small = convert(checkpoint, tmp_path / "small", to="flax_switch", changes={"weights": "int8"})
    _, scores, predictions = evaluate_checkpoint(recipe, str(small), mesh=mesh)
    on_the_way = dataclasses.replace(recipe, model={"weights": "int8"})
    assert evaluate_checkpoint(on_the_way, checkpoint, mesh=mesh)[1:] == (scores, predictions)
    floats = evaluate_checkpoint(recipe, checkpoint, mesh=mesh)[1]
    assert scores["cross_entropy"] == pytest.approx(floats["cross_entropy"], rel=0.02)
    assert scores["cross_entropy"] != floats["cross_entropy"]
