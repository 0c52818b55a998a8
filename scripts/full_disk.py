"""Fills the disk at ten moments of a pre-training and of a conversion, and looks what comes of it.

    python scripts/full_disk.py                    # needs the right to mount a tmpfs
    python scripts/full_disk.py --moments 2 --commands convert

A tmpfs of a part of what the command needs is the disk. The command must end within seconds in one sentence, without a traceback,
or go on without what could not be written; every checkpoint that is there must be whole. With room for all of it the same command
then ends as one whose disk was never full.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kill_table import Case, compared, run, undisturbed, warm_up

PATIENCE = 60  # seconds longer than undisturbed, on a machine that does other things too
PHASE_OF = {"pretrain": "report", "convert": "conversion"}  # all of a command is compared in this one
SMALLEST = 0.02  # of what a command needs


def mounted(folder: Path, kibibytes: int, *more: str) -> bool:
    """Makes the folder a tmpfs of a size (or, with "remount", changes that); returns whether that is allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ",".join([*more, f"size={kibibytes}k"])
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


def needs(folder: Path) -> int:
    """Returns the kibibytes that the files below a folder take on a tmpfs, whose pages have four."""
    return sum(4 * -(-path.stat().st_size // 4096) + 4 for path in folder.rglob("*"))


def fill(base: Path, folder: Path, name: str, part: float) -> dict[str, Any]:
    """Runs a command on a disk that has room for a part of what it needs, then with more; returns what came of it."""
    case = Case(folder, base)
    size = max(int(part * (needs(base / name) + (needs(base / "cache") if name == "pretrain" else 0))), 4)
    assert mounted(folder, size)
    try:
        began, notes = time.monotonic(), base.parent / "notes" / f"{name}-{part:.2f}"
        shutil.rmtree(notes, ignore_errors=True)
        status = run(case.arguments(name), ["report"], None, notes)
        seconds = time.monotonic() - began
        said = (notes / "log.txt").read_text()
        broken = damaged(folder / name)
        mounted(folder, 1 << 16, "remount")
        again = status and run(case.arguments(name), ["report"], None, notes / "again")  # not where it has done all
        different = compared(base, folder, PHASE_OF[name]) if again == 0 else [(notes / "again" / "log.txt").read_text()]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    return {
        "command": name, "part": part, "status": status, "seconds": round(seconds, 1), "sentence": said.strip().split("\n")[-1],
        "traceback": "Traceback" in said, "damaged": broken, "differences": different,
    }  # fmt: skip


def damaged(workdir: Path) -> list[str]:
    """Names what is wrong with the complete checkpoints of a workdir."""
    from flax_switch.host.manifest import damage

    steps = [step for step in (workdir / "checkpoints").glob("*") if step.name.isdecimal()]
    return [found for found in map(damage, steps) if found]


def is_fine(result: dict[str, Any]) -> bool:
    """Says whether a full disk cost nothing but its place."""
    told = result["status"] == 0 or (result["status"] == 2 and "o space left" in result["sentence"])
    return told and not (result["traceback"] or result["damaged"] or result["differences"])


def main() -> int:
    """Returns 0 where every full disk was survived, 77 where none can be mounted."""
    parser = argparse.ArgumentParser(description="Fills the disk under commands.")
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--commands", nargs="*", default=["pretrain", "convert"], choices=["pretrain", "convert"])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / ".kills")
    args = parser.parse_args()
    disk = args.folder / "disk"
    if not mounted(disk, 16):
        print("A tmpfs cannot be mounted here.")
        return 77
    subprocess.run(["umount", str(disk)], check=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(args.folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    warm_up()
    undisturbed(args.folder / "undisturbed")
    fine = True
    for name in args.commands:
        for moment in range(args.moments):
            part = SMALLEST + (0.95 - SMALLEST) * moment / max(args.moments - 1, 1)
            result = fill(args.folder / "undisturbed", disk, name, part)
            fine &= is_fine(result)
            print("fine" if is_fine(result) else "NOT FINE", result, flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
