"""TensorBoard's events, written in the thread that has them: a full disk costs the events and nothing else."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class _Guard:
    """Ends the writing at the first error of the operating system."""

    def __init__(self, board: Any, what: object) -> None:
        self._board, self._what = board, what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, OSError):
            return False
        writer, self._board._writer = self._board._writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
        log.warning("%s cannot be written (%s); training goes on without.", self._what, error.strerror or error)
        return True


class Board:
    """Writes scalars to an events file. Those of steps from `purge_step` on that a killed run left are hidden.

    tensorboardX's own writer hands events to a thread; where that dies of a full disk, the queue to it fills and training waits for
    ever. Here the first error is told once in the log, and no more events are written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Opens a new events file in `folder`."""
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2
        self._writer: Any = None
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        with self._guarded(folder):
            from tensorboardX.event_file_writer import EventsWriter

            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            self._writer.write_event(self._proto.Event(step=purge_step, wall_time=time.time(), file_version="brain.Event:2"))
            self._writer.write_event(self._proto.Event(step=purge_step, wall_time=time.time(), session_log=start))

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step."""
        from tensorboardX.summary import scalar

        with self._guarded("TensorBoard's events"):
            if self._writer is None:
                return
            for name, value in values.items():
                event = self._proto.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with self._guarded("TensorBoard's events"):
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _guarded(self, what: object) -> contextlib.AbstractContextManager:
        return _Guard(self, what)
