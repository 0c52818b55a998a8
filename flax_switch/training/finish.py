"""The end of a run: a few masked spans filled in as text, the report, and where everything lies."""

from __future__ import annotations

from etils import epath

from flax_switch.training.loop import RunResult, describe
from flax_switch.training.progress import console


def finish(result: RunResult, workdir: epath.PathLike) -> None:
    """Prints how the run ended."""
    console.print(describe(result.evaluation))
