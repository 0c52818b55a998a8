"""A claim on a path: one holder at a time, named to the others, gone with its process."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from flax_switch import ConfigError
from flax_switch.host import locks
from flax_switch.host.locks import locked

HOLD = """
import sys, time
from flax_switch.host.locks import locked
with locked(sys.argv[1], what="conversion"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path/out`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def assert_held(path):
    with pytest.raises(ConfigError, match="in use"), locked(path, what="test"):
        pass


def test_the_second_is_told_what_holds_the_path_which_process_where_and_since_when(tmp_path, holder):
    words = rf"conversion, pid {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'out'} is in use.*{words}"), locked(tmp_path / "out", what="conversion"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_lock_dies_with_its_owner_and_what_it_left_is_taken_over_and_removed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out.lock").exists()
    with locked(tmp_path / "out", what="conversion"):
        assert f"pid {os.getpid()} " in (tmp_path / "out.lock").read_text()
    assert not any(tmp_path.iterdir())


def test_two_threads_exclude_each_other_and_two_paths_do_not(tmp_path):
    with locked(tmp_path / "a", what="conversion"), locked(tmp_path / "b", what="conversion"):
        assert_held(tmp_path / "a")
    with locked(tmp_path / "a", what="conversion"):
        pass


def test_two_names_of_one_folder_are_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with locked(tmp_path / "folder", what="run"):
        assert_held(tmp_path / "link")


def test_never_two_hold_one_path_however_they_race_for_a_file_that_each_removes(tmp_path):
    inside, most, won = [0], [0], [0]

    def contend():
        for _ in range(300):
            try:
                with locked(tmp_path / "out", what="test"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    won[0] += 1
                    inside[0] -= 1
            except ConfigError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and won[0] > 0 and not any(tmp_path.iterdir())


def test_a_file_that_its_holder_removed_after_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    removed, lock = [], locks._lock

    def removed_before_locking(file):
        if not removed:
            removed.append(file)
            (tmp_path / "out.lock").unlink()
        lock(file)

    monkeypatch.setattr(locks, "_lock", removed_before_locking)
    with locked(tmp_path / "out", what="test"):
        assert f"pid {os.getpid()} " in (tmp_path / "out.lock").read_text()


def test_where_the_file_system_has_no_locks_the_log_says_so_and_the_work_goes_on(tmp_path, monkeypatch, caplog):
    def none(file):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", none)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "out", what="conversion"):
        pass
    assert "has no locks" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges there")
def test_a_lock_file_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a.lock").symlink_to("precious")
    os.mkfifo(tmp_path / "b.lock")
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=rf"{name}\.lock"), locked(tmp_path / name, what="test"):
            pass
    assert (tmp_path / "precious").read_text() == "kept"
