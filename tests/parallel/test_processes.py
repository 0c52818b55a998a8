"""Several processes train as one: the same losses, checkpoints for any number of processes, and an end for all when one dies."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_worker import pieces

from flax_switch.cli import main
from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.host.manifest import MANIFEST, damage
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.processes import LOST_ANOTHER, Connection
from flax_switch.training.checkpoint import Checkpoints
from flax_switch.training.metrics import read_metrics
from flax_switch.training.state import build_run
from flax_switch.workflows.pretrain import pretrain

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10  # seconds
TIMING = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run on a text of its own; experts over the devices of a process, data over processes: rows interleave."""
    folder = tmp_path_factory.mktemp("text")
    words = ["switch", "router", "expert", "token", "capacity", "layer", "sparse", "dense", "batch", "mesh"]
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, 12)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    return ExperimentConfig(
        model=SwitchConfig(
            vocab_size=128, d_model=8, d_ff=16, num_heads=2, d_kv=4, num_encoder_layers=1, num_decoder_layers=1,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=4, dropout_rate=0.1,
            expert_dropout_rate=0.0,  # each device draws its own, as it does jitter: they change with the mesh
        ),
        data=DataConfig(
            source=str(folder / "text.txt"), vocabulary_size=30, num_sentinels=10, inputs_length=16, targets_length=8, batch_size=8,
            heldout_fraction=0.1, cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=4, min_dim_size_to_factor=4),
        mesh=MeshConfig(expert=2),
        train=TrainConfig(steps=4, log_every=1, eval_every=100, eval_batches=2, checkpoint_every=100, sample_spans=0),
    )  # fmt: skip


class Processes:
    """Local processes in sessions of their own, killed with all they started when the block ends."""

    def __init__(self, commands, folder, environments):
        folder.mkdir(parents=True)
        self.logs = [folder / f"{i}.log" for i in range(len(commands))]
        self.running = []
        for command, env, log in zip(commands, environments, self.logs, strict=True):
            with log.open("w") as output:
                options = dict(cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                self.running.append(subprocess.Popen(command, **options))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, timeout=400):
        end = time.monotonic() + timeout
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.running]

    def text(self, i):
        return " ".join(self.logs[i].read_text().split())

    def succeed(self):
        assert self.wait() == [0] * len(self.running), "\n".join(log.read_text() for log in self.logs)


def environment(devices):
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NPROC": "32"}


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def work(config, workdir, folder, count, what, devices=2, worker="process_worker.py", more=None):
    """`process_worker`, or another, in `count` processes; returns the state that they hold together, and the data's position."""
    address = f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    script = str(Path(__file__).with_name(worker))
    commands = [
        [sys.executable, script, str(folder / "config.json"), str(workdir), str(folder / f"{i}.pickle"), what] for i in range(count)
    ]
    one = {**environment(devices), **(more or {}), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    with Processes(commands, folder / "logs", [{**one, "JAX_PROCESS_ID": str(i)} for i in range(count)]) as processes:
        processes.succeed()
    dumps = [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(count)]
    return joined(piece for found, _ in dumps for piece in found), [position for _, position in dumps]


def joined(found):
    """Whole arrays by path, out of pieces that must cover them and agree where they overlap."""
    arrays, covered = {}, {}
    for path, shape, bounds, piece in found:
        place = tuple(slice(*b) for b in bounds)
        array = arrays.setdefault(path, np.zeros(shape, piece.dtype))
        seen = covered.setdefault(path, np.zeros(shape, bool))
        np.testing.assert_array_equal(array[place][seen[place]], piece[seen[place]], err_msg=path)
        array[place], seen[place] = piece, True
    assert all(seen.all() for seen in covered.values())
    return arrays


def assert_same_to_the_bit(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def metrics(workdir, timing=False):
    return [{k: v for k, v in line.items() if timing or k not in TIMING} for line in read_metrics(workdir)]


def assert_same_to_rounding(some, others):
    assert [(line["step"], line["kind"]) for line in some] == [(line["step"], line["kind"]) for line in others]
    for one, other in zip(some, others, strict=True):
        for name, value in one.items():
            if name != "kind":
                # A gain is the difference of two losses, and each of them may differ by its rounding.
                atol = 2e-5 * one["cross_entropy"] if name.startswith("encoder_gain/") else 1e-6
                np.testing.assert_allclose(value, other[name], rtol=2e-5, atol=atol, err_msg=f"{name} of step {one['step']}")


@pytest.fixture(scope="module")
def by_two(config, tmp_path_factory):
    """A run of two processes with two devices each: its workdir, and its last state as they held it."""
    folder = tmp_path_factory.mktemp("two")
    state, _ = work(config, folder / "run", folder / "work", 2, "pretrain")
    return folder / "run", state


@pytest.fixture(scope="module")
def by_one(config, tmp_path_factory):
    """The same run, and two steps more, in this process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    longer = config.replace(train=config.train.replace(steps=6, eval_every=4))
    pretrain(longer.replace(mesh=MeshConfig(expert=4)), workdir)
    return workdir


def test_two_processes_have_the_losses_of_one(by_two, by_one):
    two = metrics(by_two[0])
    assert [line["step"] for line in two] == [1, 2, 3, 4, 4]
    assert_same_to_rounding(two, [line for line in metrics(by_one) if line["step"] <= 4])


def test_a_checkpoint_of_two_processes_restores_in_one_on_another_mesh_to_the_bit(config, by_two):
    workdir, state = by_two
    run = build_run(config, create_mesh(MeshConfig(data=2, expert=2, model=2)))
    checkpoints = Checkpoints(workdir)
    restored, position = checkpoints.restore(run.abstract_state)
    checkpoints.close()
    assert position["next_batch"] == 4
    assert_same_to_the_bit(joined(pieces(restored)), state)
    spread = restored.params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"].sharding.spec
    assert tuple(spread) == ("expert", None, "model")


def test_every_process_has_summed_up_its_own_files(by_two):
    step = by_two[0] / "checkpoints" / "4"
    listed = json.loads((step / MANIFEST).read_text())["files"]
    there = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()} - {MANIFEST}
    assert listed.keys() == there
    assert {part for name in there for part in name.split("/") if part.startswith("ocdbt.")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert damage(step) is None


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_by_two_processes_that_go_on_from_the_one_before(config, by_two, tmp_path):
    often = config.replace(train=config.train.replace(checkpoint_every=1, steps=3))
    whole, _ = work(often, tmp_path / "run", tmp_path / "first", 2, "pretrain")
    files = [
        path for path in (tmp_path / "run" / "checkpoints" / "3").rglob("*") if "ocdbt.process_1" in str(path) and path.is_file()
    ]
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 4
    files[0].write_bytes(content)
    state, _ = work(often, tmp_path / "run", tmp_path / "again", 2, "pretrain")
    said = (tmp_path / "again" / "logs" / "0.log").read_text()
    assert "The checkpoint of step 3 is damaged" in said and "from step 2." in said
    assert_same_to_the_bit(state, whole)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2", "3", "3.damaged"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_skips_the_update_of_both(config, tmp_path):
    often = config.replace(train=config.train.replace(checkpoint_every=1))
    poisoned = {"POISONED_STEPS": "2"}
    state, _ = work(often, tmp_path / "run", tmp_path / "work", 2, "pretrain", worker="poisoned_worker.py", more=poisoned)
    assert [line.get("skipped_steps", 0) for line in metrics(tmp_path / "run") if line["kind"] == "train"] == [0, 1, 1, 1]
    assert all(np.isfinite(array).all() for array in state.values())
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == [2, 3, 4]
    checkpoints.close()


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_restores_in_four_to_the_bit(config, by_two, tmp_path):
    workdir, state = by_two
    other = config.replace(mesh=MeshConfig(data=2, expert=4, model=1))
    restored, positions = work(other, workdir, tmp_path / "four", 4, "restore")
    assert_same_to_the_bit(restored, state)
    assert [position["next_batch"] for position in positions] == [4] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"), [(1, MeshConfig(expert=2)), (4, MeshConfig(expert=4)), (2, MeshConfig(data=1, model=4))]
)
def test_another_number_of_processes_goes_on_with_the_losses_of_one(config, by_two, by_one, tmp_path, count, mesh):
    workdir = tmp_path / "run"
    shutil.copytree(by_two[0], workdir)
    work(config.replace(mesh=mesh, train=config.train.replace(steps=6)), workdir, tmp_path / "work", count, "pretrain")
    assert_same_to_rounding(metrics(workdir), metrics(by_one))


# --- started as a user starts them


LONG = ("train.steps=150", "train.eval_every=75", "train.checkpoint_every=40", "mesh.expert=1")


def start(config, workdir, folder, *more, count=2, environments=None, numbers=None, told=True):
    """`flax-switch pretrain` in `count` processes of one device; `more` are options of each process.

    Unless `told`, they have to find each other by the environment.
    """
    folder.mkdir(parents=True)
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from flax_switch.config import ExperimentConfig\nfrom flax_switch.config.recipes import to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(ExperimentConfig.from_dict({config.to_dict()!r}))\n"
    )
    command = [sys.executable, "-m", "flax_switch.cli", "pretrain", "--config", str(recipe), "--workdir", str(workdir)]
    command += [f"--config.{setting}" for setting in LONG]
    command += ["--distributed", f"--heartbeat-timeout={HEARTBEAT}", "--connect-timeout=120"]
    if told:
        command += [f"--coordinator-address=127.0.0.1:{free_port()}"]
    commands = []
    for i in range(count):
        place = [f"--process-id={i}", f"--num-processes={numbers[i] if numbers else count}"] if told else []
        commands.append([*command, *place, *(more[i] if more else ())])
    return Processes(commands, folder / "logs", environments or [environment(1)] * count)


def wait_for(condition, processes, timeout=400):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "no progress"
        assert all(process.poll() is None for process in processes.running), [log.read_text() for log in processes.logs]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with start(config, folder / "run", folder / "work") as processes:
        processes.succeed()
    assert processes.text(1).count("step") == 0  # process 0 alone reports
    return metrics(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["killed", "first killed", "hung"]
)
def test_when_one_process_dies_the_other_ends_and_the_run_resumes(config, undisturbed, tmp_path, victim, number):
    workdir, survivor = tmp_path / "run", 1 - victim
    with start(config, workdir, tmp_path / "first") as processes:
        wait_for(lambda: any(line["step"] >= 60 for line in read_metrics(workdir)), processes)
        processes.running[victim].send_signal(number)
        died = time.monotonic()
        assert processes.running[survivor].wait(HEARTBEAT + 30) == LOST_ANOTHER, processes.text(survivor)
        took = time.monotonic() - died
        assert took < HEARTBEAT + 15
        assert processes.running[victim].poll() == (-signal.SIGKILL if number == signal.SIGKILL else None), "killed, or still hung"
    assert re.search(r"Process \d lost (another process|process 0)", processes.text(survivor))
    steps = [line["step"] for line in read_metrics(workdir)]
    assert 60 <= max(steps) < 150
    with start(config, workdir, tmp_path / "second") as processes:
        processes.succeed()
    assert re.search(r"from step (40|80|120)\.", processes.text(0))
    assert metrics(workdir) == undisturbed


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(config, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with start(config, workdir, tmp_path / "first") as processes:
        wait_for(lambda: "held out" in processes.text(0), processes)  # before the first step: the run is short
        processes.running[1].send_signal(signal.SIGTERM)
        assert processes.wait() == [1, 1], processes.text(0)
    stopped_at = max(line["step"] for line in read_metrics(workdir))
    assert stopped_at < 150
    assert f"saved at step {stopped_at}." in processes.text(0)
    with start(config, workdir, tmp_path / "second") as processes:
        processes.succeed()
    assert f"from step {stopped_at}." in processes.text(0)
    assert metrics(workdir) == undisturbed


@pytest.mark.slow
def test_settings_that_differ_between_processes_end_all_of_them_naming_the_field(config, tmp_path):
    with start(config, tmp_path / "run", tmp_path / "seeds", [], ["--config.data.seed=5"]) as processes:
        assert processes.wait() == [2, 2]
    assert "Process 1 differs from process 0: data.seed is 5, in process 0 0." in processes.text(1)
    assert "process 1 differs from process 0" in processes.text(0)
    assert not (tmp_path / "run").exists()
    with start(config, tmp_path / "run", tmp_path / "numbers", numbers=[2, 4]) as processes:
        assert processes.wait() == [2, 2]
    assert "number of processes is 4, in process 0 2" in processes.text(1)


@pytest.mark.slow
def test_slurm_s_tasks_find_each_other(config, tmp_path):
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    environments = [{**environment(1), **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    short = ["--config.train.steps=2"]
    with start(config, tmp_path / "run", tmp_path / "work", short, short, environments=environments, told=False) as processes:
        processes.succeed()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 2]


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others_with_its_reason(config, tmp_path):
    (tmp_path / "file").write_text("")
    own_caches = config.replace(data=config.data.replace(cache_dir=None))
    caches = [str(tmp_path / "cache"), str(tmp_path / "file")]
    environments = [{**environment(1), "XDG_CACHE_HOME": cache} for cache in caches]
    with start(own_caches, tmp_path / "run", tmp_path / "work", environments=environments) as processes:
        begun = time.monotonic()
        assert processes.wait() == [LOST_ANOTHER, 2], processes.text(0)
        assert time.monotonic() - begun < 60
    assert "Process 1 failed: Cannot write" in processes.text(0)
    assert "Start every process again" in processes.text(0)


@pytest.mark.slow
def test_a_coordinator_that_is_not_there_and_processes_that_do_not_come_are_said(config, tmp_path):
    for process_id in (0, 1):
        more = [f"--process-id={process_id}", "--num-processes=2", "--connect-timeout=4"]
        begun = time.monotonic()
        with start(config, tmp_path / "run", tmp_path / f"alone{process_id}", more, count=1) as processes:
            assert processes.wait(90) == [2]
        assert time.monotonic() - begun < 60
        assert "Not all processes met at the coordinator (process 0) at 127.0.0.1:" in processes.text(0)


@pytest.mark.slow
def test_without_a_cluster_the_missing_options_are_named():
    command = [sys.executable, "-m", "flax_switch.cli", "pretrain", "--config", "configs/tiny.py", "--workdir", "/nowhere/run"]
    result = subprocess.run([*command, "--distributed"], cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=90)
    assert result.returncode == 2
    assert "JAX detects no cluster here" in result.stderr
    assert "--coordinator-address, --num-processes, --process-id" in result.stderr


def test_how_processes_find_each_other_is_checked(monkeypatch, capsys):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    assert Connection.resolved() == Connection()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    found = Connection.resolved(process_id=3, num_processes=8)
    assert (found.coordinator_address, found.num_processes, found.process_id) == ("10.0.0.1:8476", 8, 3)
    with pytest.raises(ConfigError, match=r"less than their number \(4\); it is 4"):
        Connection.resolved(process_id=4)
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        Connection.resolved(coordinator_address="somewhere")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES must be a number"):
        Connection.resolved()
    assert main(["pretrain", "--config", "configs/tiny.py", "--workdir", "x", "--num-processes=2"]) == 2
    assert "add --distributed" in capsys.readouterr().err
