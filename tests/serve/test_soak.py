"""A server as a process of its own, under many requests, some of them hostile: right, of a steady size, and ended in good order.

A soak asks ten thousand times, this test alone three hundred times.
"""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from client import Client, alone, requests, small_model
from hostile import BAD, asked_with

REQUESTS = 10_000 if "SOAK_ROUND" in os.environ else 300
SEED = int(os.environ.get("SOAK_ROUND", 0))
CLIENTS = 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "small"
    pretrained = small_model()
    pretrained.save_pretrained(folder, format="flax_switch")
    return pretrained, folder


def memory(process):
    """Bytes of a process in memory, where the system says."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc to read the size of a process from")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])


@pytest.mark.slow
def test_a_server_stays_right_and_of_a_size_and_ends_in_good_order(model, tmp_path):
    pretrained, folder = model
    command = [sys.executable, "-m", "flax_switch", "serve", str(folder), "--port", "0"]
    command += ["--slots", "8", "--max-source-length", "48", "--max-tokens", "16", "--max-body", "20000", "--queue", "64"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+) ", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        soak(Client(int(found[1])), pretrained, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def soak(client, pretrained, process):
    rng = np.random.default_rng(SEED)
    cases = list(requests(REQUESTS * 9 // 10, SEED)) + [BAD[name] for name in rng.choice(sorted(BAD), REQUESTS // 10)]
    cases = [cases[i] for i in rng.permutation(len(cases))]
    answers, before = [], 0

    def ask(case):
        body = case[0] if len(case) == 2 else asked_with(case[0])
        return client.post("/v1/completions", {**body, "model": "small"} if len(case) == 2 else body)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, len(cases), REQUESTS // 10):
            answers += pool.map(ask, cases[start : start + REQUESTS // 10])
            before = before or memory(process)
    assert memory(process) < 1.05 * before, "memory grows"
    for case, (status, answer) in zip(cases, answers, strict=True):
        assert status == (200 if len(case) == 2 else case[1]), (case, answer)
    served = [i for i, case in enumerate(cases) if len(case) == 2]
    for i in rng.choice(served, min(500, len(served)), replace=False):
        assert [choice["text"] for choice in answers[i][1]["choices"]] == alone(pretrained, *cases[i]), cases[i]
