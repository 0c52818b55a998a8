"""The launch files for SLURM, ssh, JobSet and Ray: what they start, and that runs started by them are those of two shells.

`srun` and `ssh` are stand-ins that start processes here, as SLURM and hosts would; JAX's detection of SLURM is real.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flax_switch import cli
from flax_switch.config import recipes
from flax_switch.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
PAGE = (ROOT / "docs" / "launching.md").read_text()

SRUN = """#!/bin/bash
# What SLURM tells the tasks of a step; the options are srun's own.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
trap 'kill -TERM $first' TERM
wait $first; status=$?
while kill -0 $first 2>/dev/null; do wait $first; status=$?; done
wait $second
exit $status
"""
SSH = """#!/bin/bash
echo "$1" >>"$HOSTS_ASKED"
exec sh -c "$2"
"""
ECHO = """#!/bin/bash
# A command that says what it was given, and where; with --wait it does not end by itself.
trap 'echo stopped; exit 1' TERM
echo "$(printf '%s|' "$PWD" "$@")"
for word in "$@"; do
  [[ $word == --fail ]] && exit 7
  while [[ $word == --wait ]]; do sleep 0.05; done
done
exit 0
"""


@pytest.fixture
def environment(tmp_path):
    """The environment of a host with the stand-ins, on which `flax-switch` is whatever the test says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "ssh": SSH, "flax-switch": ECHO}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    found = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    found |= {"PATH": f"{folder}:{os.environ['PATH']}", "HOSTS_ASKED": str(tmp_path / "asked"), "PORT": str(free_port())}
    return found | {"PYTHONPATH": str(ROOT), "NPROC": "32", "JAX_PLATFORMS": "cpu"}


def free_port(first=1024):
    while True:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0 if first == 1024 else first + int.from_bytes(os.urandom(2)) % (65536 - first)))
            return bound.getsockname()[1]


def started(*command, environment, **options):
    """Starts a command that a signal can end, though this process, as one in the background, may be told to ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is handled here is not ignored there
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes, **options)


def ended(process, timeout=20):
    """Exit status and both outputs of a process; what it started and left is killed, as it is where it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # its pipes are closed
            pass
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["ssh.sh", "slurm.sbatch"])
def test_the_shell_can_read_it(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("path", sorted(path for path in LAUNCH.iterdir() if path.is_file()), ids=lambda path: path.name)
def test_the_command_at_its_head_is_one_and_the_page_names_it(path):
    assert f"scripts/launch/{path.name}" in PAGE
    head = path.read_text()[:800]
    assert f"scripts/launch/{path.name}" in head
    if path.name != "jobset.yaml":
        argv = shlex.split(re.search(r"(pretrain --config .*)", head)[1])
        assert cli.parse_known(argv)[1] == []
        recipes.load_recipe(argv[2])


def test_ssh_starts_a_process_on_each_host_in_this_folder_with_arguments_as_they_were(environment, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    words = ["pretrain", "--workdir", "it's $HOME", "--config.data.source=a b"]
    process = started("bash", LAUNCH / "ssh.sh", "one,two", *words, environment=environment, cwd=folder)
    status, out, err = ended(process)
    assert (status, err) == (0, "")
    port = environment["PORT"]
    shared = [str(folder), *words, "--distributed", "--coordinator-address", f"one:{port}", "--num-processes", "2", "--process-id"]
    assert sorted(out.splitlines()) == ["|".join([*shared, str(i), ""]) for i in range(2)]
    assert sorted((tmp_path / "asked").read_text().split()) == ["one", "two"]


def test_ssh_runs_what_a_host_needs_first_and_ends_with_the_status_of_a_failure(environment):
    process = started("bash", LAUNCH / "ssh.sh", "one", "doctor", "--fail", environment={**environment, "SETUP": "cd /; echo set"})
    status, out, _ = ended(process)
    assert status == 7 and out.startswith("set\n/|doctor|--fail|")
    status, _, err = ended(started("bash", LAUNCH / "ssh.sh", "one", environment=environment))
    assert status == 2 and err.startswith("Usage: bash scripts/launch/ssh.sh HOST")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_ssh_reaches_process_0_which_may_take_its_time(number, environment, tmp_path):
    process = started("bash", LAUNCH / "ssh.sh", "one", "pretrain", "--wait", environment=environment, cwd=tmp_path)
    assert process.stdout.readline().endswith("--process-id|0|\n")
    process.send_signal(number)
    status, out, _ = ended(process)
    assert (status, out) == (1, "stopped\n") and not list(tmp_path.glob(".launched*"))


def test_slurm_starts_a_process_a_task(environment):
    environment["SLURM_JOB_ID"] = "1"
    status, out, err = ended(started("bash", LAUNCH / "slurm.sbatch", "pretrain", "--workdir", "a b", environment=environment))
    assert (status, err) == (0, "")
    assert out.splitlines() == 2 * [f"{os.getcwd()}|pretrain|--workdir|a b|--distributed|"]


def test_slurm_is_asked_for_what_there_is():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    numbers = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"}
    assert asked.keys() == numbers | {"job-name", "time", "signal", "requeue", "open-mode"}
    assert all(asked[name].isdecimal() for name in numbers) and asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d", asked["time"]) and asked["signal"] == "TERM@180" and asked["open-mode"] == "append"


# --- JobSet: what jobset.x-k8s.io/v1alpha2 and batch/v1 call the fields that are used. A name with ! must be there.
CONTAINER = {
    "name!": str, "image!": str, "command": [str], "ports": [{"containerPort!": int}], "resources": {"limits": dict},
    "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
}  # fmt: skip
POD = {"restartPolicy": ("Never", "OnFailure"), "terminationGracePeriodSeconds": int, "containers!": [CONTAINER]}
JOB = {
    "completions": int, "parallelism": int, "completionMode": ("Indexed", "NonIndexed"), "backoffLimit": int,
    "template!": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {"name!": str},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"spec": JOB}}],
    },
}


def misfit(value, form, where=""):
    """Where a value is not of a form, or None."""
    if isinstance(form, dict) and isinstance(value, dict):
        known = {name.rstrip("!"): inner for name, inner in form.items()}
        missing = [name[:-1] for name in form if name.endswith("!") and name[:-1] not in value]
        wrong = missing or [name for name in value if name not in known]
        inner = (misfit(value[name], known[name], f"{where}.{name}") for name in value if name in known)
        return f"{where}.{wrong[0]}" if wrong else next(filter(None, inner), None)
    if isinstance(form, list) and isinstance(value, list):
        return next(filter(None, (misfit(one, form[0], f"{where}[]") for one in value)), None)
    if isinstance(form, tuple):
        return None if value in form else where
    return None if isinstance(form, type) and type(value) is form else where


def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_jobset_has_fields_that_there_are():
    assert misfit(jobset(), JOBSET) is None
    other = jobset()
    other["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["env"][1]["value"] = 4
    assert misfit(other, JOBSET) == ".spec.replicatedJobs[].template.spec.template.spec.containers[].env[].value"
    assert misfit({**jobset(), "kind": "Job"}, JOBSET) == ".kind"
    del other["metadata"]["name"]
    assert misfit(other, JOBSET) == ".metadata.name"


def test_the_jobsets_pods_are_the_processes_of_one_run():
    found = jobset()
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") or entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in container["env"]}
    number, name = int(values["JAX_NUM_PROCESSES"]), found["metadata"]["name"]
    assert number == spec["completions"] == spec["parallelism"] and job["replicas"] == 1
    assert spec["completionMode"] == "Indexed" and values["JAX_PROCESS_ID"].endswith("/job-completion-index']")
    host, _, port = values["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and int(port) == container["ports"][0]["containerPort"]
    assert spec["backoffLimit"] == 0 and found["spec"]["failurePolicy"]["maxRestarts"] > 0  # all restart, or none
    program, command, *argv = container["command"]
    args = cli.build_parser(command).parse_args([command, *argv])
    assert (program, args.distributed) == ("flax-switch", True)
    recipes.load_recipe(args.config)


# --- real runs of two processes with a device each
SMALL = [
    "pretrain", "--config", "tiny", "--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_kv=8",
    "--config.model.d_ff=32", "--config.model.num_encoder_layers=1", "--config.model.num_decoder_layers=1",
    "--config.model.num_sparse_encoder_layers=1", "--config.model.num_sparse_decoder_layers=0", "--config.data.batch_size=8",
    "--config.data.inputs_length=24", "--config.data.targets_length=28", "--config.train.log_every=1",
    "--config.train.eval_every=99", "--config.train.eval_batches=1", "--config.train.sample_spans=0",
    "--config.train.checkpoint_every=99", "--no-compile-cache",
]  # fmt: skip
STEPS = 4
TIMING = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the token cache of all runs, and the losses of two processes that were started by hand."""
    folder = tmp_path_factory.mktemp("runs")
    one = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    one |= {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "NPROC": "32", "JAX_PLATFORMS": "cpu"}
    one |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "flax_switch", *run_in(folder, "by-hand"), "--distributed"]
    running = [started(*command, environment={**one, "JAX_PROCESS_ID": str(i)}) for i in range(2)]
    results = [ended(process, 400) for process in running]
    assert [status for status, _, _ in results] == [0, 0], results
    return folder, losses(folder / "by-hand")


def run_in(folder, name, steps=STEPS):
    return [*SMALL, f"--config.data.cache_dir={folder / 'text'}", f"--config.train.steps={steps}", "--workdir", str(folder / name)]


def losses(workdir):
    sessions = [json.loads(line) for line in (workdir / "sessions.jsonl").read_text().splitlines()]
    assert all(one["processes"] == 2 for one in sessions if one["event"] == "start")
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir) if line["kind"] == "train"]


def real(environment):
    (Path(environment["PATH"].split(":")[0]) / "flax-switch").write_text(
        f'#!/bin/bash\nexec {sys.executable} -m flax_switch "$@"\n'
    )
    return {**environment, "XLA_FLAGS": ""}


@pytest.mark.slow
def test_slurm_trains_what_two_shells_train(shared, environment):
    folder, expected = shared
    environment["SLURM_JOB_ID"] = str(free_port(61440) - 61440)  # JAX makes the coordinator's port of it
    status, out, err = ended(started("bash", LAUNCH / "slurm.sbatch", *run_in(folder, "slurm"), environment=real(environment)), 400)
    assert status == 0, out + err
    assert losses(folder / "slurm") == expected


@pytest.mark.slow
def test_ssh_trains_what_two_shells_train_also_where_it_was_stopped_and_started_again(shared, environment):
    folder, expected = shared
    launch = ["bash", LAUNCH / "ssh.sh", "localhost,127.0.0.1"]
    process = started(*launch, *run_in(folder, "ssh", 10**6), environment=real(environment))
    stop_when_it_trains(process, folder / "ssh")
    status, out, err = ended(process, 400)
    assert status == 1 and "saved at step" in out, out + err
    assert losses(folder / "ssh")[: len(expected)] == expected
    steps = len(losses(folder / "ssh")) + 2
    status, out, err = ended(started(*launch, *run_in(folder, "ssh", steps), environment=real(environment)), 400)
    assert status == 0 and "Continuing" in out, out + err
    assert [line["step"] for line in losses(folder / "ssh")] == list(range(1, steps + 1))


def stop_when_it_trains(process, workdir):
    """Sends SIGTERM when a run has made as many steps as the others."""
    end = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < end:
        if (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text().splitlines()) >= STEPS:
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.2)
    pytest.fail("it did not train: " + str(ended(process, 1)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_ray_trains_what_two_shells_train_and_stops_when_it_is_told_to(shared, environment):
    folder, expected = shared
    one = {**environment, "XLA_FLAGS": "", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    launch = [sys.executable, LAUNCH / "ray_run.py", "--num-processes", "2", "--num-cpus", "0.5", "--"]
    status, out, err = ended(started(*launch, *run_in(folder, "ray"), environment=one), 400)
    assert status == 0, out + err
    assert losses(folder / "ray") == expected
    process = started(*launch, *run_in(folder, "ray-stopped", 10**6), environment=one)
    stop_when_it_trains(process, folder / "ray-stopped")
    status, out, err = ended(process, 400)
    assert status == 1 and "saved at step" in out + err, out + err
