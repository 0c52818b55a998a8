"""A server as a process of its own, under many requests, some of them hostile: right, of a steady size, and ended in good order.

A soak asks ten thousand times, this test alone three hundred times.
"""

import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from client import LIMITS, Client, alone, requests, small_model
from hostile import BAD, asked_with

REQUESTS = 10_000 if "SOAK_ROUND" in os.environ else 300
SEED = int(os.environ.get("SOAK_ROUND", 0))
CLIENTS = 32
TIMEOUT = 20  # of the server, in seconds
KEY = "a-key"
ODD = ("", " ", "é" * 20, "\u202e\x00\x07", "👩‍👩‍👧", "<pad></s><extra_id_0>", "ﬁ\u0301 \u2028 \ufffe", "\U0010ffff a")
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
    command = [sys.executable, "-m", "flax_switch", "serve", str(folder), "--port", "0", "--timeout", str(TIMEOUT)]
    command += ["--slots", "8", "--max-source-length", "48", "--max-tokens", "16", "--max-body", "20000", "--queue", "64"]
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLAX_SWITCH_API_KEY": KEY}
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, env=environment)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+) ", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        client = Client(int(found[1]))
        soak(client, pretrained, process)
        end_under_load(client, pretrained, process)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def soak(client, pretrained, process):
    """Nine of ten requests can be served, among them one prompt again and again and odd texts; the others are hostile."""
    rng = np.random.default_rng(SEED)
    served = fitting(pretrained, REQUESTS * 9 // 10, SEED)
    again = served[0]  # greedy
    for i in range(0, len(served), 20):
        served[i] = again
        odd = dict(prompt=ODD[i // 20 % len(ODD)], max_tokens=8, temperature=0)
        served[i + 1] = odd, dict(seed=0)
    hostile = [*BAD, "wrong key", "no key", "cut off", *(["slow"] if len(served) > 1000 else [])]
    cases = [(served_as, case) for case in served] + [(refused, name) for name in rng.choice(hostile, REQUESTS // 10)]
    cases += [(refused, "slow")]
    cases = [cases[i] for i in rng.permutation(len(cases))]
    answers, before = [], 0
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, len(cases), REQUESTS // 10):
            answers += pool.map(lambda case: case[0](client, case[1]), cases[start : start + REQUESTS // 10])
            before = before or memory(process)
    assert memory(process) < 1.05 * before, "memory grows"
    told = [(case, answer) for (kind, case), answer in zip(cases, answers, strict=True) if kind is served_as]
    assert len({json.dumps(answer) for case, answer in told if case is again}) == 1, "one prompt has several answers"
    for i in rng.choice(len(told), min(500, len(told)), replace=False):
        case, answer = told[i]
        assert answer == alone(pretrained, *case), case


def fitting(pretrained, count, seed):
    """Requests that the server has room for: of thousands a few are longer."""
    return [
        case for case in requests(count, seed) if len(pretrained.vocabulary.encode(case[0]["prompt"])) < LIMITS.max_source_length
    ]


def served_as(client, case):
    """Returns the texts of a request that must be served."""
    status, answer = client.post("/v1/completions", {**case[0], "model": "small"}, Authorization=f"Bearer {KEY}")
    assert status == 200, (case, answer)
    return [choice["text"] for choice in answer["choices"]]


def refused(client, name):
    """Sends what must be refused with a status that fits, or what nobody waits for."""
    body, wanted = asked_with({}), 401
    headers = {"Authorization": f"Bearer {KEY}"}
    if name in ("slow", "cut off"):
        drip(client.port, cut=name == "cut off")
        return
    if name in BAD:
        body, wanted = asked_with(BAD[name][0]), BAD[name][1]
    elif name == "wrong key":
        headers = {"Authorization": f"Bearer {KEY}s"}
    else:
        headers = {}
    status, answer = client.post("/v1/completions", body, **headers)
    assert (status, bool(answer["error"]["message"])) == (wanted, True), (name, answer)


def drip(port, cut):
    """Sends half of a body; leaves then, or waits until the server has waited long enough."""
    body = json.dumps(dict(model="small", prompt="a")).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        if not cut:
            assert b" 408 " in connection.recv(100)


def end_under_load(client, pretrained, process):
    """A signal while all clients ask: what was taken is answered rightly, what comes after is refused, and the status is 0."""
    cases = fitting(pretrained, 40 * CLIENTS, SEED + 1)

    def ask(case):
        try:
            return client.post("/v1/completions", {**case[0], "model": "small"}, Authorization=f"Bearer {KEY}")
        except (ConnectionError, http.client.HTTPException):
            return 0, None  # nobody listens there any more

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, case) for case in cases]
        while not asked[CLIENTS].done():
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        answers = [one.result() for one in asked]
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 503, 0}, set(statuses)
    assert CLIENTS < statuses.count(200) < len(cases), statuses
    for case, (status, answer) in list(zip(cases, answers, strict=True))[:: 1 if len(cases) < 100 else 10]:
        if status == 200:
            assert [choice["text"] for choice in answer["choices"]] == alone(pretrained, *case), case
