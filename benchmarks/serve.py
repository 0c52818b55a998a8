"""A server under load beside a loop over `generate`: requests per second, and how long one takes, at several numbers of clients.

    python benchmarks/serve.py                               # tiny and base-8: minutes
    python benchmarks/serve.py --shapes tiny --clients 1 8   # a part of it

Every request has another source of --source tokens and asks for exactly --new-tokens greedy ones. Clients are threads of a process
of their own that ask again as soon as they have an answer; the server runs in this one, and contenders take turns. "loop" answers
one request after the other by `generate`, "batch" is one call of `generate` with 32 sources, told as requests per second.
"transformers" is the same weights behind the same framework (starlette and uvicorn), which answers one request after the other; it
comes last. Compilation is not counted.
Quiet machines only.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

SHAPES = {
    "base-8": dict(
        vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_encoder_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=8,
    ),
}  # fmt: skip
BATCH = 32


def config_of(shape: str):
    """Returns a shape's model; "tiny" is the recipe's."""
    import flax_switch as fs
    from flax_switch.config.recipes import load_recipe

    config = load_recipe("tiny").model if shape == "tiny" else fs.SwitchConfig(**SHAPES[shape])
    return config.replace(dropout_rate=0.0)


def load(port: int, clients: int, requests: int, source: int, new_tokens: int, vocab_size: int) -> None:
    """Asks the server from so many threads and prints the seconds of all, and of each request, as JSON."""
    import random

    draw = random.Random(clients)
    prompts = [[draw.randrange(2, vocab_size) for _ in range(source - 1)] + [1] for _ in range(requests)]
    local = threading.local()

    def ask(prompt: list[int]) -> float:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        body = json.dumps(dict(prompt=prompt, max_tokens=new_tokens, temperature=0))
        began = time.perf_counter()
        local.connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = local.connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        assert json.loads(content)["usage"]["completion_tokens"] == new_tokens, content
        return time.perf_counter() - began

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        seconds = list(pool.map(ask, prompts))
    print(json.dumps(dict(requests=requests, total=time.perf_counter() - began, seconds=seconds)))


def measure(shape: str, args: argparse.Namespace) -> list[dict]:
    """Returns a row for the loop, the batch, and each number of clients."""
    import jax
    import numpy as np

    import flax_switch as fs
    from flax_switch.data.byte_vocabulary import ByteVocabulary
    from flax_switch.pretrained import Pretrained
    from flax_switch.serving.app import build_app
    from flax_switch.serving.limits import Limits
    from flax_switch.serving.serve import prepare

    config = config_of(shape)
    model = fs.SwitchTransformer(config)
    params = fs.init_params(model, jax.random.key(0))
    # EOS must not end an output before its time: that every contender makes as many tokens is part of the comparison.
    controls = dict(suppress_tokens=(1,))
    pretrained = Pretrained(config, model, params, ByteVocabulary.with_sentinels(), generation_defaults=controls)
    sources = np.random.default_rng(0).integers(2, config.vocab_size, (BATCH, args.source)).astype(np.int32)
    took: dict[str, list[tuple[float, list[float]]]] = {}  # requests per second and seconds of each, by turn

    def timed(name: str, calls: list) -> None:
        seconds = []
        for ids in calls:
            began = time.perf_counter()
            pretrained.generate(ids, max_new_tokens=args.new_tokens)
            seconds.append(time.perf_counter() - began)
        took.setdefault(name, []).append((sum(map(len, calls)) / sum(seconds), seconds))

    def asked(name: str, port: int, clients: int, requests: int) -> None:
        sizes = dict(clients=clients, source=args.source, new_tokens=args.new_tokens, vocab_size=config.vocab_size)
        found = _asked(port, **sizes, requests=max(requests, 2 * clients))
        took.setdefault(f"{name}, {clients}", []).append((found["requests"] / found["total"], found["seconds"]))

    one_by_one = [sources[i % BATCH : i % BATCH + 1] for i in range(args.requests[shape] // args.turns)]
    limits = Limits(slots=BATCH, max_source_length=args.source, max_tokens=args.new_tokens, timeout=600.0)
    began = time.perf_counter()
    server = prepare({shape: pretrained}, limits)
    print(f"{shape}: {time.perf_counter() - began:.0f} s to compile", flush=True)
    with running(build_app(server)) as port:
        for turn in range(-1, args.turns):  # the first compiles, and is forgotten
            timed("loop", one_by_one if turn >= 0 else one_by_one[:1])
            timed("batch", [sources])
            for clients in args.clients:
                asked("ours", port, clients, len(one_by_one) if turn >= 0 else clients)
            if turn < 0:
                took.clear()
    if args.transformers:
        with running(transformers_app(config, params, args.new_tokens)) as port:
            for clients in args.clients:
                asked("transformers", port, clients, min(args.requests[shape], 100))
    rows = [_row(shape, name, turns) for name, turns in took.items()]
    _compare(rows)
    return rows


def transformers_app(config, params, new_tokens: int):
    """Returns an application that answers by transformers' `generate`, a request after the other."""
    import tempfile
    import threading

    import torch
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import SwitchTransformersForConditionalGeneration

    import flax_switch as fs
    from flax_switch.config.huggingface import with_huggingface_semantics

    with tempfile.TemporaryDirectory() as folder:
        fs.save_pretrained(folder, with_huggingface_semantics(config)[0], params, format="huggingface", overwrite=True)
        model = SwitchTransformersForConditionalGeneration.from_pretrained(folder).eval()
    free = threading.Lock()

    def said(ids: list[int]) -> int:
        with free, torch.inference_mode():
            options = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1)
            return model.generate(torch.tensor([ids]), **options).shape[1] - 1

    async def complete(request):
        values = await request.json()
        return JSONResponse({"usage": {"completion_tokens": await asyncio.to_thread(said, values["prompt"])}})

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


class running:  # noqa: N801 - used as a context
    """An application that is served in a thread of this process; the value is its port."""

    def __init__(self, app):
        import uvicorn

        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="auto", ws="none")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve()), daemon=True)

    def __enter__(self) -> int:
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        return self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def __exit__(self, *error) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def _asked(port: int, **sizes: int) -> dict:
    command = [sys.executable, __file__, "--load", json.dumps(dict(port=port, **sizes))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout)


def _compare(rows: list[dict]) -> None:
    """Adds to each row how many times the loop's requests per second it has."""
    loop = next(row for row in rows if row["name"] == "loop")
    for row in rows:
        row["times_loop"] = row["requests_per_second"] / loop["requests_per_second"]
        print(f"{row['shape']:8} {row['name']:16} {row['times_loop']:6.2f} times the loop")


def _row(shape: str, name: str, turns: list[tuple[float, list[float]]]) -> dict:
    rate, seconds = statistics.median(rate for rate, _ in turns), sorted(each for _, several in turns for each in several)
    p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    row = dict(shape=shape, name=name, requests_per_second=rate, p50=statistics.median(seconds), p95=p95)
    print(f"{shape:8} {name:16} {rate:9.2f} requests/s  p50 {1000 * row['p50']:9.1f} ms  p95 {1000 * p95:9.1f} ms", flush=True)
    return row


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "base-8"], choices=["tiny", *SHAPES])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--source", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tiny-requests", type=int, default=1000)
    parser.add_argument("--base-requests", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4, help="of the loop, the batch and the clients; the rate is their median")
    parser.add_argument("--no-transformers", action="store_false", dest="transformers", help="leave transformers out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serve.json"))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(**json.loads(args.load))
        return
    args.requests = {"tiny": args.tiny_requests, "base-8": args.base_requests}
    import jax
    import run_record

    rows = [row for shape in args.shapes for row in measure(shape, args)]
    settings = dict(source=args.source, new_tokens=args.new_tokens, turns=args.turns)
    run_record.write(args.output, dict(**settings, rows=rows), device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
