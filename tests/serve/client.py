"""A small model, a server of it at a free port of this machine, and a client that speaks plain HTTP."""

import asyncio
import contextlib
import http.client
import json
import threading

import jax
import numpy as np
import uvicorn

from flax_switch.config import SwitchConfig
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.generation.text import texts_of
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import Pretrained
from flax_switch.serving.app import build_app
from flax_switch.serving.limits import Limits
from flax_switch.serving.serve import _Uvicorn, prepare

TEXT = "the cat sat on the mat and a dog ran after the cat into the big red house of a man who sang"
LIMITS = Limits(slots=8, max_source_length=48, max_tokens=16, queue=64, max_body=20_000, timeout=60.0)


def small_model(seed=0, **changes):
    """Random weights, scaled so that outputs vary with the input and are not all of one token."""
    vocabulary = Vocabulary.train([TEXT] * 30, 28, num_sentinels=4)
    settings = dict(
        vocab_size=32, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    config = SwitchConfig(**{**settings, **changes})
    model = SwitchTransformer(config)
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(model, jax.random.key(seed)))
    return Pretrained(config, model, params, vocabulary)


def requests(count, seed=0):
    """Requests of mixed lengths and controls, and what `generate` is given for the same."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = " ".join(rng.choice(TEXT.split(), rng.integers(1, 13)))
        asked, controls = dict(max_tokens=int(rng.integers(1, 17))), {}
        if i % 3 == 0:
            asked |= dict(temperature=0)
        else:
            controls = dict(do_sample=True, temperature=float(rng.uniform(0.3, 2)), top_k=5)
            controls |= dict(top_p=float(rng.uniform(0.3, 1)), top_k=0) if i % 3 == 2 else {}
            asked |= {name: controls[name] for name in controls if name != "do_sample"} | dict(seed=int(rng.integers(2**32)))
            if i % 6 == 1:
                asked["n"] = controls["num_return_sequences"] = 3
        yield dict(prompt=prompt, **asked), dict(controls, seed=asked.get("seed", 0))


def alone(model, body, controls):
    """The texts of `generate`; all of its longest outputs are by the same program, of which a request takes a part."""
    sequences = model.generate(body["prompt"], max_new_tokens=LIMITS.max_tokens, **controls).sequences
    return texts_of(sequences[:, : 1 + body["max_tokens"]], model.vocabulary, model.config)


class Client:
    """What a client of the server does."""

    def __init__(self, port):
        self.port = port

    @contextlib.contextmanager
    def asked(self, method, path, body=None, headers=()):
        """A response whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, raw, {"Content-Type": "application/json", **dict(headers)})
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path, **headers):
        with self.asked("GET", path, headers=headers) as response:
            return response.status, response.read().decode()

    def post(self, path, body, **headers):
        """Status and JSON."""
        with self.asked("POST", path, body, headers) as response:
            return response.status, json.loads(response.read())

    def complete(self, **body):
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer

    def texts(self, **body):
        return [choice["text"] for choice in self.complete(**body)["choices"]]

    def events(self, **body):
        """The events of a stream, the last of which must say that it is done."""
        with self.asked("POST", "/v1/completions", {**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            assert response.getheader("content-type").startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def metric(self, name):
        return next(float(line.split()[-1]) for line in self.get("/metrics")[1].splitlines() if line.startswith(f"{name} "))


class Running:
    """A server in a thread of this process."""

    def __init__(self, models, limits=LIMITS, key=None, local=True):
        self.server = prepare(models, limits)
        config = uvicorn.Config(
            build_app(self.server, key, local=local), port=0, log_config=None, access_log=False, lifespan="on", ws="none"
        )
        self.uvicorn = _Uvicorn(config, self.server.engine.drain)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.uvicorn.serve()

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            self.thread.join(0.01)
        self.client = Client(self.uvicorn.servers[0].sockets[0].getsockname()[1])
        return self

    def end(self):
        """What a signal does."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.uvicorn.handle_exit, 15, None)

    def __exit__(self, *error):
        self.end()
        self.thread.join(60)
        assert not self.thread.is_alive()
