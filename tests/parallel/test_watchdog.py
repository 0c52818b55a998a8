"""A step that does not end is noticed, those that are missing are named, and the run goes on when all are started again."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from test_processes import Processes, config, environment, free_port, wait_for  # noqa: F401 - config is a fixture

from flax_switch.parallel import watchdog
from flax_switch.parallel.processes import LOST_ANOTHER
from flax_switch.parallel.watchdog import Watchdog
from flax_switch.training.metrics import read_metrics

WORKER = str(Path(__file__).with_name("process_worker.py"))


@pytest.fixture
def service(monkeypatch):
    """What processes note, and what this one, the first of three, says at its end."""
    notes, said, over = {}, [], threading.Event()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(watchdog, "_BEAT", 0.02)
    monkeypatch.setattr(watchdog.processes, "note", lambda key, text: notes.__setitem__(key.rpartition("/")[2], text))
    monkeypatch.setattr(watchdog.processes, "noted", lambda beginning: dict(notes))
    monkeypatch.setattr(watchdog.processes, "exit_within", lambda seconds, status: threading.Timer(600, time.time))
    monkeypatch.setattr(watchdog.processes, "end_as_lost", lambda reason: (said.append(reason), over.set()))
    notes["1"] = json.dumps({"begun": 5, "beats": 9})
    return notes, said, over


def wait_until_computed(monkeypatch, ends):
    """The results of steps are events, computed when they are set."""
    monkeypatch.setattr(jax, "block_until_ready", lambda event: event.wait(10))
    return [threading.Event() for _ in range(ends)]


def test_who_is_missing_at_a_step_is_said(service, monkeypatch):
    _, said, over = service
    first, second, third = wait_until_computed(monkeypatch, 3)
    first.set()
    with Watchdog(0.2, start=3) as dog:
        for number, result in ((4, first), (5, second), (6, third)):
            with dog.step(number) as end:
                end(result)
        time.sleep(0.1)
        second.set()
        assert over.wait(10)
        third.set()
    assert (
        "for step 6 to end, longer than train.step_timeout=0.2 s: process 1 has not begun it; process 2 has not begun it; "
        in said[0]
    )
    assert "process 1 gives no sign of life" in said[0]


def test_steps_that_end_in_time_and_the_first_one_end_nothing(service, monkeypatch):
    _, said, _ = service
    (done,) = wait_until_computed(monkeypatch, 1)
    done.set()
    with Watchdog(0.1, start=0) as dog:
        with dog.step(1):
            time.sleep(0.3)  # compiles
        for number in range(2, 8):
            with dog.step(number) as end:
                end(done)
            time.sleep(0.04)
        time.sleep(0.3)  # an evaluation
    assert said == []


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_and_the_run_goes_on(config, tmp_path):  # noqa: F811
    train = config.train.replace(steps=300, checkpoint_every=20, eval_every=300, step_timeout=5.0)
    (tmp_path / "config.json").write_text(json.dumps(config.replace(train=train).to_dict()))

    def started(name):
        commands = [
            [
                sys.executable,
                WORKER,
                str(tmp_path / "config.json"),
                str(tmp_path / "run"),
                str(tmp_path / f"{i}.pickle"),
                "pretrain",
            ]
            for i in range(2)
        ]
        one = {**environment(2), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        return Processes(commands, tmp_path / name, [{**one, "JAX_PROCESS_ID": str(i)} for i in range(2)])

    with started("first") as processes:
        wait_for(lambda: any(line["step"] >= 30 for line in read_metrics(tmp_path / "run")), processes)
        processes.running[1].send_signal(signal.SIGSTOP)
        assert processes.running[0].wait(90) == LOST_ANOTHER, processes.text(0)
        assert "longer than train.step_timeout=5 s: process 1" in processes.text(0)
        assert "gives no sign of life" in processes.text(0) and "Start every process again" in processes.text(0)
    with started("second") as processes:
        processes.succeed()
    assert "from step" in processes.text(0)
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) == 300
