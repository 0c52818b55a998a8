"""A process that dies makes the others end with one sentence and status 3, whatever they are at: JAX alone would abort them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import Processes, environment, free_port, wait_for

from flax_switch.parallel.processes import LOST_ANOTHER

WORKER = str(Path(__file__).with_name("idle_worker.py"))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")


@pytest.mark.parametrize(
    ("count", "victim", "number"),
    [
        (2, 0, signal.SIGKILL),
        pytest.param(3, 0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(3, 2, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(2, 0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=["first killed", "first of three killed", "another killed", "hung", "first hung"],
)
def test_those_who_wait_end_with_a_sentence(tmp_path, count, victim, number):
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, WORKER, address, str(count), str(i)] for i in range(count)]
    with Processes(commands, tmp_path / "logs", [environment(1)] * count) as processes:
        wait_for(lambda: all("met" in processes.text(i) for i in range(count)), processes, 90)
        processes.running[victim].send_signal(number)
        survivors = [i for i in range(count) if i != victim]
        assert [processes.running[i].wait(40) for i in survivors] == [LOST_ANOTHER] * len(survivors), processes.text(survivors[0])
    for i in survivors:
        said = [line for line in processes.logs[i].read_text().splitlines() if line.startswith("flax-switch: Process")]
        assert len(said) == 2, processes.text(i)  # that it looks for the others, and this
        assert said[1].startswith(f"flax-switch: Process {i} lost process 0, or process 0 another one")
        assert "Start every process again with the same command" in said[1]
        for word in ("terminate called", "Check failure stack trace", "Fatal Python error", "Traceback"):
            assert word not in processes.text(i)


def test_a_process_that_fails_ends_though_the_coordination_service_never_answers():
    program = """
import time
from types import SimpleNamespace
from flax_switch.parallel import processes
never = lambda *_: time.sleep(60)
processes._client = lambda: SimpleNamespace(key_value_set=never, blocking_key_value_get=never)
processes._process = lambda: 1
processes._PATIENCE = 0.5
processes._fail(ERROR)
"""
    for error, said in (("ValueError('Gloo failed')", ""), ("ValueError('mine')", "ValueError: mine")):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("ERROR", error)], env=environment(1), capture_output=True, text=True, timeout=50
        )
        assert done.returncode == LOST_ANOTHER and said in done.stderr, done.stderr
