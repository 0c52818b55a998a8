"""Results that outlive a kill: finished lines are appended to FILE.partial, and FILE is written as a whole at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

from flax_switch.config import ConfigError, check
from flax_switch.host.files import check_writable, read_bytes, write_text
from flax_switch.host.json_text import field, json_object


def digest_of(run: dict[str, Any]) -> str:
    """Returns a hash of the settings that results depend on."""
    return hashlib.blake2b(json.dumps(run, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Partial:
    """Holds the results of an output file's lines while they are made. Use it as a context.

    A run that is cut off leaves FILE as it was, and FILE.partial, whose first line says what run it is of; `resume=True` goes on
    with it. Raises `ConfigError` before any work for a place that cannot be written, and for a partial file that is of another
    run or that nobody asked to continue.
    """

    def __init__(self, output: Path, run: dict[str, Any], *, resume: bool) -> None:
        """Reads what is done. run: the settings that results depend on."""
        self._output, self._path = output, output.with_name(f"{output.name}.partial")
        self._run = digest_of(run)
        self.done: dict[int, dict[str, Any]] = {}
        check_writable(output)
        check_writable(self._path)
        if self._path.exists():
            self._read(resume)

    def _read(self, resume: bool) -> None:
        # Texts may hold what `splitlines` takes for an end of line; in JSON no newline stands within one.
        first, *lines = read_bytes(self._path, 1 << 36).decode(errors="replace").split("\n")
        for line in lines:
            try:
                result = json_object(line, str(self._path))
                self.done[field(result, "line", int, str(self._path))] = result
            except ConfigError:
                break  # a line that the kill cut short
        kept = f"{self._path} holds {len(self.done)} finished lines of a run that was cut off"
        check(resume, f"{kept}; continue it with --resume, or delete that file.")
        check(
            first == self._head(), f"{kept}, with another input, checkpoint or other controls; restore them, or delete that file."
        )

    def _head(self) -> str:
        return json.dumps({"run": self._run})

    def __enter__(self) -> Self:
        """Opens the partial file, with the finished lines alone in it."""
        text = "\n".join([self._head(), *(json.dumps(result, ensure_ascii=False) for result in self.done.values())])
        try:
            write_text(self._path, text + "\n")
            self._file: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise ConfigError(f"Cannot write {self._output}: {error.strerror or error}.") from error
        return self

    def add(self, results: Iterable[dict[str, Any]]) -> None:
        """Appends finished lines."""
        for result in results:
            self.done[result["line"]] = result
            self._file.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Writes the output file, all lines in order, and removes the partial one."""
        in_order = (self.done[number] for number in sorted(self.done))
        write_text(self._output, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in in_order))
        self._file.close()
        self._path.unlink()

    def __exit__(self, *error: object) -> None:
        self._file.close()
