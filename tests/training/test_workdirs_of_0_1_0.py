"""Workdirs of 0.1.0, whose config.json says no kind: they are recognised, and they resume to the bit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_switch.config import ConfigError
from flax_switch.config.kinds import RECIPES, RUNS, kind_of
from flax_switch.host.manifest import MANIFEST
from flax_switch.training.checkpoint import Checkpoints, claim_workdir, read_config, write_config
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.pretrain import pretrain

GOLDENS = Path(__file__).parent / "goldens"


def workdir_of_0_1_0(folder, kind):
    """A workdir with the config.json that 0.1.0 wrote."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDENS / f"config_0.1.0_{kind}.json", folder / "config.json")
    return folder


def losses(workdir):
    """Everything that was computed, by step; rates of speed left out."""
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]


@pytest.mark.parametrize("kind", RUNS)
def test_a_config_that_says_no_kind_is_recognised_and_one_that_is_written_says_it(tmp_path, kind):
    old = workdir_of_0_1_0(tmp_path / "old", kind)
    assert "kind" not in json.loads((old / "config.json").read_text())
    config = read_config(old)
    assert type(config) is RUNS[kind] and config.kind == kind
    assert claim_workdir(old, config) == old
    write_config(tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert next(iter(written.items())) == ("kind", kind)
    assert kind_of(written) == kind and read_config(tmp_path) == config


def test_kinds_have_one_name_each_and_others_are_refused():
    assert list(RECIPES) == list(RUNS) == ["pretraining", "distillation", "finetuning"]
    with pytest.raises(ConfigError, match="Did you mean 'finetuning'"):
        kind_of({"kind": "finetune"})
    with pytest.raises(ConfigError, match="kind must be one of 'pretraining'"):
        RUNS["pretraining"].from_dict({"kind": "distillation"})


def test_a_run_of_0_1_0_resumes_to_the_bit(tmp_path):
    config = read_config(workdir_of_0_1_0(tmp_path / "old", "pretraining"))
    undisturbed = pretrain(config, tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    meta = tmp_path / "stopped" / "checkpoints" / "2" / "meta" / "metadata"
    values = json.loads(meta.read_text())
    assert "step" not in values, "the step is the name of the folder"
    meta.write_text(json.dumps({**values, "version": 1, "step": 2}))  # 0.1.0 wrote it here, too
    (meta.parents[1] / MANIFEST).unlink()  # which 0.1.0 did not write
    resumed = pretrain(config, workdir_of_0_1_0(tmp_path / "stopped", "pretraining"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    assert [line["step"] for line in losses(tmp_path / "stopped") if line["kind"] == "train"] == [1, 2, 3, 4]
    assert Checkpoints(tmp_path / "stopped").latest_step() == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.state, undisturbed.state)
