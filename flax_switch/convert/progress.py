"""A progress bar of bytes on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, *, enabled: bool = True) -> Iterator[dict[str, Callable[[int], None]]]:
    """Yields the `on_open` and `on_bytes` callbacks of `convert`, drawn as a bar; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield {}
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(title, total=None)

    def on_open(total: int) -> None:
        bar.update(task, total=total)
        bar.start()  # only now: an error before it should stand alone

    try:
        yield {"on_open": on_open, "on_bytes": lambda count: bar.advance(task, count)}
    finally:
        bar.stop()
