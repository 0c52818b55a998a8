"""Runs cases, one after another, and says before each that it begins and after it how it ended: python -m tests.fuzz.worker GOOD.

Cases come by standard input as "reader/number", a line each. What asks for memory without measure gets none.
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

ADDRESSES = 32 << 30  # bytes of address space for what cases ask for; what they use, the parent watches
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
    cases = sys.stdin.read().split()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in {case.rpartition("/")[0] for case in cases}:
            if READERS[name].warm:
                run_case(READERS[name], name, 0, good, Path(folder) / "case")
        said.write(json.dumps({"state": "ready"}) + "\n")
        for case in cases:
            name, _, number = case.rpartition("/")
            said.write(json.dumps({"state": "begins", "case": case}) + "\n")
            faulthandler.dump_traceback_later(SECONDS - 0.5, exit=False, repeat=True)
            result, text, started = "fine", "", time.process_time()
            try:
                run_case(READERS[name], name, int(number), good, Path(folder) / "case")
            except BaseException as error:
                result, text = outcome_of(error), "".join(traceback.format_exception(error))
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            seconds = time.process_time() - started
            said.write(json.dumps({"state": "ends", "outcome": result, "seconds": seconds, "text": text[-6000:]}) + "\n")


if __name__ == "__main__":
    main()
