"""`process_worker` whose steps named by POISONED_STEPS have a loss that is no number in one process alone."""

import os
import sys
from pathlib import Path

import pytest
from process_worker import main

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from poison import poison_steps

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["JAX_PROCESS_ID"] == "1":
            poison_steps(patch, *map(int, os.environ["POISONED_STEPS"].split()))
        else:
            poison_steps(patch)
        main(*sys.argv[1:])
