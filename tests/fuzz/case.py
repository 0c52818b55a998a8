"""What a reader under test is, and how a case of it is made: by the reader's name and a number, the same every time."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import damage_folder


@dataclasses.dataclass(frozen=True)
class Reader:
    """Writes good inputs into a folder, and reads them, or their damaged copies, in a way that users' commands do."""

    make: Callable[[Path], Any]
    read: Callable[[Path, random.Random], Any]
    damaged: tuple[str, ...] = ("*",)  # patterns of the files that are damaged; none: `read` draws what is wrong by itself
    warm: bool = False  # whether to read once before, as what is imported late takes seconds that are no case's


def run_case(reader: Reader, name: str, number: int, good: Path, place: Path) -> Any:
    """Reads a damaged copy of a reader's inputs; number 0 is the undamaged one."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good / name, place, symlinks=True)
    rng = random.Random(f"{name}/{number}")
    if number and reader.damaged:
        damage_folder(place, reader.damaged, rng)
    return reader.read(place, rng)
