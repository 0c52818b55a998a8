"""Train steps that a plan compiled and kept: a run that loads one computes the same and compiles none, and takes no other's."""

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_switch import cli
from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, SwitchConfig
from flax_switch.parallel.mesh import create_mesh
from flax_switch.plan import plan
from flax_switch.training.saved_program import MANIFEST_FILE, PROGRAM_FILE, program_stepper
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import abstract_batch
from flax_switch.training.stepper import build_stepper

SLOW = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = SwitchConfig(
    architecture="decoder_only", vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=24, num_decoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=4,
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(batch_size=16, inputs_length=8, targets_length=8), mesh=MeshConfig(data=2, expert=4, fsdp=True)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    plan(CONFIG, "cpu:8", decode=False, effort="full", save_program=folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    for name in (PROGRAM_FILE, MANIFEST_FILE):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


@functools.cache
def run_of(config=CONFIG):
    return build_run(config, create_mesh(config.mesh))


def three_steps(stepper, run):
    draw = np.random.default_rng(0)
    shapes = abstract_batch(run.config, run.mesh)
    batch = {name: draw.integers(0 if "mask" in name else 1, 2, s.shape).astype(np.int32) for name, s in shapes.items()}
    state = init_state(run)
    for _ in range(3):
        before = jax.tree.leaves(state)
        state, metrics = stepper.step(state, batch)
        assert all(leaf.is_deleted() for leaf in before)  # its memory is the new state's
    return jax.tree.map(np.asarray, (state, metrics))


def test_a_loaded_step_compiles_nothing_and_computes_what_a_compiled_one_does_to_the_bit(saved, monkeypatch):
    inner, compiled = importlib.import_module("jax._src.compiler"), []
    for name in ("backend_compile_and_load", "compile_or_get_cached"):
        before = getattr(inner, name)
        note = lambda *args, before=before, **options: (compiled.append(name), before(*args, **options))[1]  # noqa: E731, B023
        monkeypatch.setattr(inner, name, note)
    run = run_of(CONFIG.replace(train=CONFIG.train.replace(log_every=7, checkpoint_every=3)))  # which are none of the step's
    stepper = program_stepper(run, saved)
    assert not compiled
    loaded = three_steps(stepper, run)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, loaded, three_steps(build_stepper(run), run))


def refusal(folder, config=CONFIG):
    with pytest.raises(ConfigError) as caught:
        program_stepper(run_of(config), folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("versions", "jax", "0.4.1", "was compiled by jax '0.4.1', and here it is '"),
        ("versions", "libtpu", "0.0.1", "was compiled by libtpu '0.0.1', and here it is None"),
        ("devices", "platform", "tpu", "was compiled for platform 'tpu', and here it is 'cpu'"),
        ("devices", "kind", "TPU v5 lite", "was compiled for kind 'TPU v5 lite', and here it is 'cpu'"),
        ("devices", "number", 16, "was compiled for number 16, and here it is 8"),
        ("devices", "mesh axis expert", 2, "was compiled for mesh axis expert 2, and here it is 4"),
        ("devices", "threads", "999", "was compiled for threads '999', and here it is '"),
        ("flags", "XLA_FLAGS", "--xla_a=1", "was compiled with XLA_FLAGS '--xla_a=1', and here it is '"),
    ],
)
def test_a_program_of_other_versions_devices_or_flags_is_refused_by_name(part, name, value, said, copy):
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest[part][name] = value
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    message = refusal(copy)
    assert said in message and f"--save-program {copy}" in message and message.count(", and here it is") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": MODEL.replace(d_ff=40)}, "with model.d_ff 24, and here it is 40."),
        pytest.param({"data": CONFIG.data.replace(batch_size=32)}, "with data.batch_size 16, and here it is 32.", marks=SLOW),
        pytest.param({"train": CONFIG.train.replace(microbatches=2)}, "with train.microbatches 1, and here it is 2.", marks=SLOW),
        ({"mesh": MeshConfig(data=4, expert=2, fsdp=True)}, "for mesh axis data 2, and here it is 4; mesh axis expert 4, and"),
        ({"mesh": MeshConfig(data=2, expert=4, mode="pmap")}, "is the step of a pretraining under jit; set mesh.mode='jit'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_program_of_other_settings_is_refused_by_name(change, said, saved):
    assert said in refusal(saved, CONFIG.replace(**change))


def test_the_program_of_other_code_is_refused(saved):
    with jax.default_matmul_precision("highest"):
        assert "from another train step, though by the same settings and versions" in refusal(saved)


def changed(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shortened(file):
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        (PROGRAM_FILE, shortened, "bytes instead of"),
        (PROGRAM_FILE, changed, f"the contents of {PROGRAM_FILE} have changed"),
        (PROGRAM_FILE, os.unlink, "Cannot read"),
        (MANIFEST_FILE, lambda file: os.truncate(file, 100), "not JSON"),
        (MANIFEST_FILE, lambda file: file.write_text("{}"), "there is no field 'versions'"),
        (MANIFEST_FILE, os.unlink, f"there is no {MANIFEST_FILE}"),
    ],
)
def test_a_program_that_is_not_whole_is_refused_before_anything_of_it_is_loaded(name, spoil, said, copy, monkeypatch):
    spoil(copy / name)
    monkeypatch.setattr("flax_switch.training.saved_program._loaded", lambda *_: pytest.fail("it was loaded"))
    assert said in refusal(copy)


def test_a_program_that_is_not_the_other_processes_is_not_loaded(copy, monkeypatch):
    def differs(values):
        raise ConfigError(f"the processes differ in {values}")

    monkeypatch.setattr("flax_switch.training.saved_program._loaded", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr("flax_switch.parallel.processes.require_same", differs)
    content = json.loads((copy / MANIFEST_FILE).read_text())["sha256"]
    assert f"the processes differ in {{'program (by hash)': '{content}'}}" in refusal(copy)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "cpu:8", "--effort", "quick"], "give --effort full, and not quick"),
        (["--topology", "cpu:8", "--no-compile"], "leave --no-compile out, or --save-program"),
        (["--topology", "h100:8"], "is not tuned on it"),
        pytest.param(["--topology", "cpu:999"], "There is no program to save: this process sees 8 CPU device(s)", marks=SLOW),
    ],
)
def test_a_plan_refuses_to_keep_what_a_run_would_not_compile(arguments, said, tmp_path, capsys):
    command = ["plan", "--config", "tiny", "--save-program", str(tmp_path / "made"), "--config.data.batch_size=3996", *arguments]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "made").exists()


COUNTING = """
import importlib, sys
inner, names = importlib.import_module("jax._src.compiler"), []
def noted(backend, module, *rest, compile=inner.backend_compile_and_load):
    names.append(str(module.operation.attributes["sym_name"]).strip('"'))
    return compile(backend, module, *rest)
inner.backend_compile_and_load = noted
from flax_switch.cli import main
status = main(sys.argv[1:])
print("compiled:", *sorted(set(names)))
sys.exit(status)
"""
SMALL = [
    "--config", "tiny", "--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_kv=8",
    "--config.model.d_ff=32", "--config.model.num_encoder_layers=1", "--config.model.num_decoder_layers=1",
    "--config.model.num_sparse_encoder_layers=1", "--config.model.num_sparse_decoder_layers=0", "--config.data.batch_size=16",
    "--config.data.inputs_length=24", "--config.data.targets_length=28", "--config.mesh.expert=4", "--config.train.log_every=1",
    "--config.train.eval_every=99", "--config.train.eval_batches=1", "--config.train.sample_spans=0", "--config.train.steps=3",
]  # fmt: skip


def environment(devices, **more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    clean |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    return clean | {"PYTHONPATH": str(ROOT)} | more


def command(*argv, environments=None):
    """Names of the programs that XLA compiled for a command, which may run in several processes."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environments = environments or [environment(8)]
    running = [subprocess.Popen([sys.executable, "-c", COUNTING, *argv], env=one, **options) for one in environments]
    try:
        done = [(process.communicate(timeout=900), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(status == 0 for _, status in done), done
    return {name for (out, _), _ in done for name in out.rpartition("compiled:")[2].split()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a program, and a function that trains there: what was compiled, and the lines of metrics.jsonl."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *more, **options):
        shared = ["--no-compile-cache", f"--config.data.cache_dir={folder / 'text'}", "--workdir", str(folder / name)]
        compiled = command("pretrain", *SMALL, *shared, *more, **options)
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        timed = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
        return compiled, [{k: v for k, v in line.items() if k not in timed} for line in lines]

    saving = ["--topology", "cpu:8", "--no-decode", "--save-program", str(folder / "program")]
    assert "jit_train_step" in command("plan", *SMALL, *saving)
    return folder, train


@pytest.mark.slow
def test_a_run_of_the_command_line_loads_what_the_plan_kept_and_has_the_losses_of_one_that_compiles(runs):
    folder, train = runs
    compiled, metrics = train("compiled")
    others, same = train("loaded", "--program", str(folder / "program"))
    assert compiled - others == {"jit_train_step"} and not others - compiled
    assert same == metrics


@pytest.mark.slow
def test_two_processes_load_what_one_compiled_and_have_the_losses_of_two_that_compile(runs):
    folder, train = runs

    def two(name, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        found = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
        environments = [environment(4, **found, JAX_PROCESS_ID=str(i)) for i in range(2)]
        return train(name, "--distributed", *more, environments=environments)

    compiled, metrics = two("two-compiled")
    others, same = two("two-loaded", "--program", str(folder / "program"))
    assert compiled - others == {"jit_train_step"}
    assert same == metrics
