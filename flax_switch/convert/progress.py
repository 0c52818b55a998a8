"""A progress bar of bytes on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, *, enabled: bool = True) -> Iterator[dict[str, Callable[[int], None]]]:
    """The `on_open` and `on_bytes` callbacks of `convert`, drawn as a bar; without `enabled`, callbacks that do nothing."""
    if not enabled:
        yield {}
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield {
            "on_open": lambda total: bar.update(task, total=total),
            "on_bytes": lambda count: bar.advance(task, count),
        }
