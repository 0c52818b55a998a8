"""One run at a time in a workdir: the second is told who holds it, and a run that was killed holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from flax_switch.config import ConfigError
from flax_switch.training.loop import one_run_at_a_time

HOLDER = """
import sys, time
from flax_switch.training.loop import one_run_at_a_time
with one_run_at_a_time(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_the_workdir_and_a_killed_one_holds_nothing(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert holder.stdout.readline() == "held\n"
        message = f"in use by another process .*training run, pid {holder.pid} on"
        with pytest.raises(ConfigError, match=message), one_run_at_a_time(workdir):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with one_run_at_a_time(workdir):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
