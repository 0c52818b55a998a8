"""Metrics go where train.log_to says: what is not here is one sentence, and a tracker that breaks costs itself alone."""

import sys
import types

import pytest

from flax_switch.config import ConfigError, ExperimentConfig, TrainConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.training.metrics import MetricsWriter, read_metrics
from flax_switch.training.trackers import open_trackers, require_trackers, scalars

LINE = {"loss": 2.0, "routers/router_entropy": [0.5, 0.25], "routers/tokens_per_expert": [[1.0, 2.0]]}


def config(*log_to):
    return ExperimentConfig(train=TrainConfig(log_to=log_to))


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that notes what it is told."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.calls, fake.broken = [], False

    class Run:
        def log(self, values, step):
            if fake.broken:
                raise ConnectionError("no network")
            fake.calls.append((step, values))

        def finish(self):
            fake.calls.append("finish")

    fake.init = lambda **options: fake.calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def write(workdir, trackers, steps=(10, 20)):
    writer = MetricsWriter(workdir, 0, trackers)
    for step in steps:
        writer.write(step, "train", LINE)
    writer.close()


def test_wandb_is_told_the_config_once_and_every_scalar(wandb, tmp_path):
    write(tmp_path, open_trackers(tmp_path, config("jsonl", "wandb"), 0))
    begun, first, second, end = wandb.calls
    assert begun["config"]["train"]["log_to"] == ["jsonl", "wandb"]
    assert (begun["name"], begun["resume"], begun["job_type"]) == (tmp_path.name, "allow", "pretraining")
    values = {
        "train/loss": 2.0,
        "train/routers/router_entropy/sparse_layer_0": 0.5,
        "train/routers/router_entropy/sparse_layer_1": 0.25,
    }
    assert (first, second, end) == ((10, values), (20, values), "finish")
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]


def test_a_run_that_continues_is_the_same_run_there_and_another_is_not(wandb, tmp_path):
    for folder in ("a", "a", "b"):
        open_trackers(tmp_path / folder, config("wandb"), 0)
    first, again, other = (call["id"] for call in wandb.calls)
    assert first == again != other


def test_a_tracker_that_breaks_is_told_once_and_the_metrics_are_all_there(wandb, tmp_path, caplog):
    wandb.broken = True
    write(tmp_path, open_trackers(tmp_path, config("wandb"), 0), steps=range(1, 9))
    assert [record.getMessage() for record in caplog.records] == [
        "wandb takes no more metrics (ConnectionError: no network); training goes on without."
    ]
    assert len(list(read_metrics(tmp_path))) == 8


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="train.log_to asks for wandb: pip install 'flax_switch\\[wandb\\]', or leave it out"):
        require_trackers(("wandb",))
    with pytest.raises(ConfigError, match="asks for tensorboard: pip install 'flax_switch\\[tensorboard\\]'"):
        require_trackers(("tensorboard",))
    assert open_trackers("nowhere", ExperimentConfig(), 0) == []  # nothing was asked for


def test_any_function_can_be_named_and_one_that_is_not_there_is_told(tmp_path, monkeypatch):
    told = []
    mine = types.ModuleType("my_tracker")
    mine.note = lambda *line: told.append(line)
    mine.number = 3
    monkeypatch.setitem(sys.modules, "my_tracker", mine)
    write(tmp_path, open_trackers(tmp_path, config("my_tracker:note"), 0))
    assert told == [(10, "train", LINE), (20, "train", LINE)]
    for name, message in (
        ("my_tracker:nope", "cannot be imported"),
        ("no_such_module:x", "cannot be imported"),
        ("my_tracker:number", "no func"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_trackers((name,))


def test_a_mistyped_tracker_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        load_recipe("tiny", ["train.log_to=('jsonl', 'wandbb')"])
    assert load_recipe("tiny", ["train.log_to=('jsonl', 'wandb')"]).train.log_to == ("jsonl", "wandb")


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, open_trackers(tmp_path, config("tensorboard"), 0))
    assert b"train/loss" in next((tmp_path / "tensorboard").glob("events*")).read_bytes()
    assert dict(scalars(LINE))["loss"] == 2.0


def test_only_jsonl_makes_no_events(tmp_path):
    write(tmp_path, open_trackers(tmp_path, config("jsonl"), 0))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
