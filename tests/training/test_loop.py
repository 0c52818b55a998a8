"""The loop's order of things, on stand-ins for all that computes: what is logged, evaluated, saved and timed, and when it ends."""

import collections
import dataclasses
import errno
import inspect
import os
import signal
import types
from typing import Any

import numpy as np
import pytest

from flax_switch.config import ExperimentConfig
from flax_switch.training import loop
from flax_switch.training.profile import Profile
from flax_switch.training.stepper import Stepper

BATCH = {"attention_mask": np.ones((2, 5), int), "decoder_attention_mask": np.ones((2, 3), int), "labels": np.zeros((2, 3), int)}
COMPILING, STEPPING, WAITING, JUDGING, SAVING = 40.0, 2.0, 0.5, 300.0, 7.0  # seconds


@dataclasses.dataclass
class State:
    """How many updates were made, and whether a stepper holds it in its own form."""

    updates: int
    held: bool = False

    @property
    def params(self):
        assert not self.held
        return f"params {self.updates}"


Result = collections.namedtuple("Result", [field.name for field in dataclasses.fields(loop.RunResult)])


class Pending(np.float32):
    """A metric that is still computed when its step returns: whoever waits for it waits for the steps before it as well."""

    def of(self, world):
        self.world = world
        return self

    def block_until_ready(self):
        self.world.clock += self.world.unfinished
        self.world.unfinished = 0.0
        return self


class World:
    """Everything that `_train` is given; `events` is what happened, `clock` the time it took."""

    def __init__(self, monkeypatch, start=0, stop_at=None, enough_at=None, **settings):
        self.events: list[Any] = []
        self.clock, self.unfinished, self.start, self.drawn, self.updates = 0.0, 0.0, start, start, start
        self.stop_at, self.enough_at = stop_at, enough_at
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(loop, "RunResult", Result)
        config = ExperimentConfig()
        train = config.train.replace(**{"steps": 7, "log_every": 2, "eval_every": 3, "checkpoint_every": 4} | settings)
        self.run = types.SimpleNamespace(config=config.replace(train=train, data=config.data.replace(batch_size=4)))

    def __next__(self):
        self.clock += WAITING
        self.drawn += 1
        return BATCH

    def get_state(self):
        return {"next_batch": self.drawn}

    def step(self, state, batch):
        assert state.held and batch is BATCH
        if self.updates == self.start:  # the program was compiled, and runs
            self.clock += COMPILING
            self.unfinished = STEPPING
        else:
            self.clock += STEPPING
        self.updates += 1
        if self.updates == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return State(state.updates + 1, held=True), {"loss": Pending(state.updates + 1).of(self)}

    def write(self, step, kind, line):
        self.events.append((kind, step, line))

    def flush(self):
        self.events.append("flush")

    def latest_step(self):
        return None

    def save(self, state, data):
        assert not state.held
        self.clock += SAVING
        self.events.append(("save", state.updates, data["next_batch"]))

    def wait(self):
        self.events.append("wait")

    def __call__(self, params):
        self.clock += JUDGING
        return {"of": params}

    def describe(self, evaluation):
        return str(evaluation)

    def conclude(self, step, params, evaluation):
        if evaluation is not None:
            assert evaluation == {"of": params}
            self.events.append(("conclude", step))
        return "it is good enough" if self.enough_at is not None and step >= self.enough_at else None

    def train(self):
        form = lambda held: lambda state: dataclasses.replace(state, held=held)  # noqa: E731
        stepper = Stepper(self.step, hold=form(True), release=form(False))
        train = inspect.unwrap(loop._train)  # the stand-ins are not of the types that tests check
        trace = Profile("nowhere", self.start, 0)
        return train(self.run, self, State(self.start), self.start, self, self, self, self, stepper, trace)

    def kinds(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def test_logging_evaluating_and_saving_come_at_their_multiples_and_at_the_end(monkeypatch):
    world = World(monkeypatch)
    result = world.train()
    assert (world.kinds("train"), world.kinds("eval"), world.kinds("save")) == ([2, 4, 6, 7], [3, 6, 7], [4, 7])
    assert world.kinds("conclude") == [3, 6, 7]
    assert result.finished and result.step == 7 and result.evaluation == {"of": "params 7"} and result.state.updates == 7
    assert [line["loss"] for kind, _, line in (e for e in world.events if e[0] == "train") if kind] == [2.0, 4.0, 6.0, 7.0]
    assert [line["of"] for _, _, line in (e for e in world.events if e[0] == "eval")] == ["params 3", "params 6", "params 7"]
    for i, event in enumerate(world.events):
        if event[0] == "save":
            assert world.events[i - 1] == "flush"  # no checkpoint is ahead of the metrics
            assert event[1] == event[2]  # the data's position is that of the state


@pytest.mark.parametrize("start", [0, 1])
def test_rates_leave_out_compiling_evaluating_and_saving(monkeypatch, start):
    """Also after a resumption, whose first step compiles as well."""
    world = World(monkeypatch, start=start, log_every=3, steps=start + 7)
    world.train()
    lines = [line for kind, _, line in (e for e in world.events if e[0] == "train") if kind]
    assert len(lines) == 3
    for line in lines:
        assert line["seconds_per_step"] == pytest.approx(STEPPING + WAITING)
        assert line["data_wait_fraction"] == pytest.approx(WAITING / (STEPPING + WAITING))
        # This process has two rows of four; 8 tokens each.
        assert line["tokens_per_second"] == pytest.approx(2 * 16 / (STEPPING + WAITING))


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(monkeypatch, capsys):
    world = World(monkeypatch, stop_at=5)
    before = signal.getsignal(signal.SIGTERM)
    result = world.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (result.finished, result.step, result.evaluation) == (False, 5, None)
    assert world.events[-1] == "wait" and world.kinds("save")[-1] == 5
    assert "SIGTERM: saved at step 5. Run the same command again to continue." in capsys.readouterr().out


def test_a_signal_at_the_last_step_finds_a_finished_run(monkeypatch):
    assert World(monkeypatch, stop_at=7).train().finished


def test_an_evaluator_may_end_the_run_which_is_saved_and_said(monkeypatch, capsys):
    world = World(monkeypatch, enough_at=3)
    result = world.train()
    assert result.finished and result.step == 3 and world.kinds("save") == [3]
    assert "Training ended at step 3: it is good enough." in capsys.readouterr().out


@pytest.mark.parametrize("settings", [dict(start=7), dict(start=3, enough_at=3)])
def test_a_complete_run_is_evaluated_and_not_trained(monkeypatch, settings):
    world = World(monkeypatch, **settings)
    result = world.train()
    assert result.finished and result.step == settings["start"] and world.updates == settings["start"]
    assert result.evaluation == {"of": f"params {settings['start']}"} and not world.kinds("save")


def test_too_many_skipped_updates_in_a_row_end_the_run_which_is_not_saved_then(monkeypatch):
    world = World(monkeypatch, max_nonfinite_steps=2)
    step = world.step

    def broken(state, batch):
        state, metrics = step(state, batch)
        bad = state.updates in (1, 3, 4)
        return state, {"loss": np.float32(np.nan if bad else 1.0), "skipped": np.float32(bad)}

    world.step = broken
    with pytest.raises(FloatingPointError, match="Up to step 4 2 updates in a row"):
        world.train()
    assert world.kinds("train") == [2, 4] and not world.kinds("save")


def test_a_full_disk_costs_the_events_and_not_the_run(tmp_path, monkeypatch, caplog):
    from tensorboardX.event_file_writer import EventsWriter

    from flax_switch.config import ExperimentConfig
    from flax_switch.training.metrics import MetricsWriter, read_metrics
    from flax_switch.training.trackers import open_trackers

    written = []

    def full(self, event):
        written.append(event)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    writer = MetricsWriter(tmp_path, 0, open_trackers(tmp_path, ExperimentConfig(), 0))
    for step in range(1, 50):
        writer.write(step, "train", {"loss": 1.0, "grad_norm": 2.0})
    writer.close()
    assert len(written) == 6, "nothing is tried again"
    assert [r.getMessage().count("No space left") for r in caplog.records] == [1]
    assert len(list(read_metrics(tmp_path))) == 49
