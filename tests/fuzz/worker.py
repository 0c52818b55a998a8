"""Runs cases, one after another, and says before each that it begins and after it how it ended: python -m tests.fuzz.worker GOOD.

Cases come by standard input as "reader/number", a line each. The memory that they may take together with the process is limited.
"""

import contextlib
import faulthandler
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

MEMORY = 3 << 30  # bytes that a case may take of address space, beside what was taken before
SECONDS = 10.0


def outcome_of(error: BaseException) -> str:
    """Returns "refused" for errors that say what a user can do, else "raw"."""
    from flax_switch.config import ConfigError

    return "refused" if isinstance(error, ConfigError) and "\n" not in str(error).strip() else "raw"


def main() -> None:
    said = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    from tests.fuzz.case import run_case
    from tests.fuzz.readers import READERS

    good = Path(sys.argv[1])
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        said.write(json.dumps({"state": "ready"}) + "\n")
        for line in sys.stdin:
            name, _, number = line.strip().rpartition("/")
            said.write(json.dumps({"state": "begins", "case": line.strip()}) + "\n")
            faulthandler.dump_traceback_later(SECONDS - 0.5, exit=False)
            result, text, started = "fine", "", time.monotonic()
            try:
                run_case(READERS[name], name, int(number), good, Path(folder) / "case")
            except BaseException as error:
                result, text = outcome_of(error), "".join(traceback.format_exception(error))
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            seconds = time.monotonic() - started
            said.write(json.dumps({"state": "ends", "outcome": result, "seconds": seconds, "text": text[-6000:]}) + "\n")


if __name__ == "__main__":
    main()
