"""Runs survive: killed or stopped anywhere they continue with the losses they would have had, and refuse what is not theirs."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_switch.cli import main
from flax_switch.config import ConfigError, ExperimentConfig
from flax_switch.config.distillation import DistillConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.pretrained import load_pretrained
from flax_switch.training.checkpoint import changeable_fields, claim_workdir, differing_fields, explain_full_disk, read_config
from flax_switch.training.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 14
ROUND = int(os.environ.get("SOAK_ROUND", "0"))  # a soak kills at other moments in every round
SETTINGS = [
    "data.batch_size=4", "data.inputs_length=16", "data.targets_length=8", "model.d_model=16", "model.d_ff=16",
    "model.num_heads=2", "model.d_kv=8", "model.num_encoder_layers=1", "model.num_decoder_layers=1", "model.dropout_rate=0.1",
    "model.num_sparse_encoder_layers=1", "model.num_sparse_decoder_layers=1", "model.router_jitter_noise=0.01",
    f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=7", "train.eval_batches=1", "train.checkpoint_every=3",
    "train.sample_spans=0", "optimizer.warmup_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and compiled programs shared by all runs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax")), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, "XLA_FLAGS": "", **cache}


def start(workdir, environment, *more, program=("-m", "flax_switch.cli")):
    command = [sys.executable, *program, "pretrain", "--config", "configs/tiny.py", "--workdir", str(workdir)]
    command += [f"--config.{s}" for s in (*SETTINGS, *more)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(workdir, environment, *more):
    process = start(workdir, environment, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(workdir):
    """Everything that training computed, by step; rates of speed left out."""
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]


def start_paused(workdir, environment, *more):
    """A run that takes its time, so that a signal cannot come after its end."""
    return start(workdir, environment, *more, program=[str(Path(__file__).with_name("paused_run.py"))])


def reached(workdir):
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def wait_for_step(workdir, step, process, timeout=240):
    end = time.monotonic() + timeout
    while reached(workdir) < step:
        assert time.monotonic() < end, f"step {step} was not reached"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir, environment)
    return losses(workdir)


def test_the_undisturbed_run_logged_every_step(undisturbed):
    assert [line["step"] for line in undisturbed if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in undisturbed if line["kind"] == "eval"] == [7, STEPS]


def killed_and_resumed(workdir, environment, *more, seed, kills):
    """What a run computed that was killed some times, and the checkpoint (or None) it went on from last."""
    generator = random.Random(seed)
    for _ in range(kills):
        process = start_paused(workdir, environment, *more)
        wait_for_step(workdir, min(reached(workdir) + generator.randint(1, 5), STEPS - 4), process)
        time.sleep(generator.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed: {output}"
        assert reached(workdir) < STEPS
    complete = [int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdigit()]
    saved = max(complete, default=None)
    output = finish(workdir, environment, *more)
    assert ("Continuing" in output) == (saved is not None), output
    assert saved is None or f"from step {saved}." in " ".join(output.split())
    return losses(workdir), saved


def test_a_killed_run_ends_with_the_losses_of_an_undisturbed_one(tmp_path, environment, undisturbed):
    found, resumed_from = killed_and_resumed(tmp_path / "run", environment, seed=0, kills=2)
    assert found == undisturbed
    assert resumed_from in range(3, STEPS, 3), "the second kill came after a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_killed_runs_end_with_the_losses_of_an_undisturbed_one(tmp_path, environment, undisturbed, seed):
    seeds = dict(seed=100 + seed + 1000 * ROUND, kills=1 + seed % 3)
    assert killed_and_resumed(tmp_path / "run", environment, **seeds)[0] == undisturbed


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, environment):
    """Settings that stream a data set of the hub, from a mirror; and the environment that names it."""
    folder = tmp_path_factory.mktemp("hub")
    dataset = folder / "datasets" / "owner" / "words"
    dataset.mkdir(parents=True)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 8))) for _ in range(300)]
    for number in range(3):
        records = (json.dumps({"text": " ".join(generator.choices(words, k=8))}) + "\n" for _ in range(4))
        (dataset / f"part-{number}.json.gz").write_bytes(gzip.compress("".join(records).encode()))
    settings = ["source=hf://datasets/owner/words/*.json.gz", "shuffle_buffer=4", "heldout_fraction=0.2", "vocabulary_size=60"]
    return {**environment, "FLAX_SWITCH_HUB_MIRROR": str(folder)}, *(f"data.{setting}" for setting in settings)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_a_killed_run_on_a_streamed_data_set_ends_with_the_bits_of_an_undisturbed_one(tmp_path, streamed, packing):
    streamed = (*streamed, f"data.packing={packing}")
    finish(tmp_path / "whole", *streamed)
    (meta,) = (tmp_path / "whole" / "checkpoints" / str(STEPS) / "meta").glob("meta*")
    (epoch, _, _, block, _), *_ = json.loads(meta.read_text())["data"]["positions"]
    assert epoch > 0 and block > 4
    found, resumed_from = killed_and_resumed(tmp_path / "run", *streamed, seed=0, kills=2)
    assert found == losses(tmp_path / "whole")
    assert resumed_from in range(3, STEPS, 3)
    whole, run = (load_pretrained(tmp_path / name).params for name in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, whole, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_where_it_is_and_continues(tmp_path, environment, undisturbed, number):
    workdir = tmp_path / "run"
    process = start_paused(workdir, environment)
    wait_for_step(workdir, 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    stopped_at = reached(workdir)
    assert 4 <= stopped_at < STEPS, "the signal came before the end"
    assert f"saved at step {stopped_at}. Run the same command again to continue." in " ".join(output.split())
    assert f"from step {stopped_at}." in " ".join(finish(workdir, environment).split())
    assert losses(workdir) == undisturbed


def test_a_run_of_the_former_default_is_refused_with_the_recipe_that_continues_it_and_a_free_folder(tmp_path, capsys):
    run, former = tmp_path / "tiny", load_recipe("tiny_language_model", ["train.steps=700"])
    claim_workdir(run, former)
    (tmp_path / "tiny_2").mkdir()
    assert main(["pretrain", "--config", "tiny", "--workdir", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--workdir {tmp_path}/tiny_3." in said
    assert f"--config tiny_language_model --workdir {run} continues the run that is there." in said
    assert read_config(run) == former


def test_a_workdir_of_another_run_is_refused_naming_the_fields(tmp_path):
    config = ExperimentConfig()
    claim_workdir(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"model.num_experts was 8, is 4; data.seed was 0, is 1"):
        claim_workdir(tmp_path / "run", config.replace(model=config.model.replace(num_experts=4), data=config.data.replace(seed=1)))
    longer = config.replace(train=config.train.replace(steps=7), mesh=config.mesh.replace(expert=2))
    assert not differing_fields(config, longer)
    claim_workdir(tmp_path / "run", longer)
    assert read_config(tmp_path / "run") == longer


MAY_CHANGE = {
    "mesh": {"data", "expert", "model", "fsdp", "mode", "dcn_data", "dcn_expert"},
    "train": {
        "steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last", "keep_every", "sample_spans", "log_to",
        "max_nonfinite_steps", "step_timeout",
    },
    "optimizer": {"learning_rate"},
    "data": {"num_workers", "prefetch", "cache_dir"},
    "model": {"remat_policy", "moe_executor", "expert_parallel_buffer_factor", "attention_implementation"},
    "evaluation": {"patience", "batch_size"},
    "distillation": {"cached_teacher"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (ExperimentConfig(), {"evaluation.patience", "evaluation.batch_size", "distillation.cached_teacher"}),
        (DistillConfig(), {"evaluation.patience", "evaluation.batch_size"}),
        (FinetuneConfig(), {"data.cache_dir", "distillation.cached_teacher"}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_these_and_no_others_may_change_when_a_run_is_resumed(config, lacks):
    assert changeable_fields(config) | lacks == {f"{section}.{name}" for section, names in MAY_CHANGE.items() for name in names}
    assert not changeable_fields(config) & lacks


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis.tex and no config.json"):
        claim_workdir(tmp_path, ExperimentConfig())
    with pytest.raises(ConfigError, match="is a file"):
        claim_workdir(tmp_path / "thesis.tex", ExperimentConfig())
    with pytest.raises(ConfigError, match="no workdir of a run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path)


def test_a_full_disk_is_one_sentence_and_other_errors_pass_through(tmp_path):
    with pytest.raises(ConfigError, match="No space left for .*run the same command again"), explain_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "denied")


def test_lines_after_the_checkpoint_and_half_written_ones_are_dropped(tmp_path):
    lines = [json.dumps({"step": s, "kind": "train", "loss": 1.0}) for s in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "ki')
    writer = MetricsWriter(tmp_path, resume_step=3)
    writer.write(4, "train", {"loss": 2.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
