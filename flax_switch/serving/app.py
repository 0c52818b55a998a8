"""The HTTP application: OpenAI's paths for completions and embeddings, routing, health, metrics and a page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flax_switch.config import ConfigError, check, one_of
from flax_switch.convert.tensors import CheckpointError
from flax_switch.host.json_text import field, json_object
from flax_switch.serving.completions import WHERE, Answer, parse, texts_or_ids
from flax_switch.serving.engine import Closing, Engine, Full, Job, Sequence
from flax_switch.serving.guard import Gone, Guard, Refusal, as_json, refused
from flax_switch.serving.limits import Limits
from flax_switch.serving.metrics import Metrics
from flax_switch.serving.models import Served
from flax_switch.serving.page import chip_colors, read_page

log = logging.getLogger(__name__)

_CLOSING = "The server is shutting down; ask another one, or again later."
_MOST_INPUTS = 256  # texts of one request for embeddings


class Server:
    """What the paths share: models by name, the engine, and what is counted."""

    def __init__(self, models: Mapping[str, Served], engine: Engine, limits: Limits):
        """Takes models and the engine that runs them, which the application's lifespan starts and stops."""
        self.models, self.engine, self.limits, self.metrics = models, engine, limits, Metrics()
        self.started, self._news = int(time.time()), dict[Job, asyncio.Event]()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Runs the engine as long as the application runs."""
        loop = asyncio.get_running_loop()

        def deliver(sequences: list[Sequence]) -> None:
            if sequences:
                loop.call_soon_threadsafe(self._tell, {sequence.job for sequence in sequences})

        self.engine.deliver = deliver
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)

    def _tell(self, jobs: set[Job]) -> None:
        for job in jobs:
            if job in self._news:
                self._news[job].set()

    def model(self, values: Mapping[str, Any]) -> Served:
        """Returns the model that a request names; it may leave out the name of the only one."""
        if len(self.models) == 1 and "model" not in values:
            return next(iter(self.models.values()))
        return self.named(field(values, "model", str, WHERE))

    def named(self, name: str) -> Served:
        """Returns a model by its name, or refuses with 404."""
        try:
            one_of("model", name, tuple(self.models))
        except ConfigError as error:
            raise Refusal(404, str(error)) from None
        return self.models[name]

    # --- paths
    async def health(self, request: Request) -> Response:
        """Says whether requests are taken."""
        closing = self.engine.draining
        return as_json({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    async def page(self, request: Request) -> Response:
        """Returns the page."""
        return Response(read_page(), media_type="text/html")

    async def counted(self, request: Request) -> Response:
        """Returns the metrics."""
        slots = self.limits.slots * len(self.engine.pools)
        gauges: dict[str, float] = {
            "sequences_running": self.engine.running,
            "sequences_waiting": self.engine.waiting,
            "slots": slots,
        }
        return Response(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        """Returns every model."""
        return as_json({"object": "list", "data": [self._about(model) for model in self.models.values()]})

    async def one_model(self, request: Request) -> Response:
        """Returns one model."""
        return as_json(self._about(self.named(request.path_params["name"])))

    def _about(self, model: Served) -> dict[str, Any]:
        found = {"id": model.name, "object": "model", "created": self.started, "owned_by": "flax_switch"}
        limits = {"max_source_length": self.limits.max_source_length, "max_tokens": self.limits.max_tokens}
        config = model.config
        colors = chip_colors(config.num_experts) if config.is_sparse else []
        return {**found, **limits, "completes": model.decoder is not None, "experts": len(colors), "colors": colors}

    async def complete(self, request: Request) -> Response:
        """Answers with completions, at once or as they come."""
        values = json_object(request.scope["body"], WHERE, what="the body")
        model = self.model(values)
        completion = await asyncio.to_thread(parse, values, model) if len(request.scope["body"]) > 10_000 else parse(values, model)
        job = completion.job()
        answer = Answer(completion, job, model)
        self._news[job] = asyncio.Event()
        try:
            self.engine.submit(model.name, job)
        except BaseException:
            del self._news[job]
            raise
        if completion.stream:
            return Stream(self, answer, request)
        try:
            async for _ in self.pieces(answer, request):
                pass
        finally:
            self.leave(answer)
        return as_json(answer.whole())

    async def pieces(self, answer: Answer, request: Request) -> AsyncIterator[tuple[int, str]]:
        """Yields what is new of every sequence until all have ended; raises where time is up or the client is gone."""
        news, sequences = self._news[answer.job], answer.job.sequences
        gone = asyncio.ensure_future(_until_gone(request.receive))
        try:
            while not answer.finished:
                told = asyncio.ensure_future(news.wait())
                await asyncio.wait(
                    (told, gone), timeout=request.scope["deadline"] - time.monotonic(), return_when="FIRST_COMPLETED"
                )
                told.cancel()
                if gone.done():
                    raise Gone
                if not news.is_set():
                    raise Refusal(408, f"The output was not complete within {self.limits.timeout:g} s; ask for fewer tokens.")
                news.clear()
                for index, sequence in enumerate(sequences):
                    if sequence.error == "closing":
                        raise Refusal(503, _CLOSING)
                    if sequence.error:
                        raise Refusal(500, "Decoding failed; the server's log says why.")
                    if (text := answer.news(index)) is not None:
                        yield index, text
        finally:
            gone.cancel()

    def leave(self, answer: Answer) -> None:
        """Ends a request: frees what it has not used up, and counts its tokens."""
        self.engine.cancel(answer.job)
        self._news.pop(answer.job, None)
        usage = answer.usage()
        for kind in ("prompt", "completion"):
            self.metrics.tokens[answer.model.name, kind] += usage[f"{kind}_tokens"]

    async def embed(self, request: Request) -> Response:
        """Answers with a vector for each text."""
        values = json_object(request.scope["body"], WHERE, what="the body")
        model = self.model(values)
        for name in values:
            one_of("A field of the request", name, ("model", "input", "encoding_format", "user"))
        form = field(values, "encoding_format", (str, type(None)), WHERE, None) or "float"
        one_of("encoding_format", form, ("float", "base64"))
        inputs = texts_or_ids(values, "input")
        check(len(inputs) <= _MOST_INPUTS, f"input holds {len(inputs)} texts; one request may have {_MOST_INPUTS}.")
        sources = [model.ids_of(text, "input") for text in inputs]
        vectors = [await self._called(request, lambda ids=ids: model.embed(ids)) for ids in sources]
        made = [base64.b64encode(v.astype("<f4").tobytes()).decode() if form == "base64" else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(made)]
        tokens = sum(map(len, sources))
        self.metrics.tokens[model.name, "prompt"] += tokens
        return as_json(
            {"object": "list", "data": data, "model": model.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        )

    async def route(self, request: Request) -> Response:
        """Answers with the experts of every token, layer by layer."""
        values = json_object(request.scope["body"], WHERE, what="the body")
        model = self.model(values)
        for name in values:
            one_of("A field of the request", name, ("model", "input", "output"))
        ids = model.ids_of(field(values, "input", str, WHERE), "input")
        output = model.ids_of(field(values, "output", str, WHERE, ""), "output", prefix="")[:-1]
        stacks = await self._called(request, lambda: model.routing(ids, output))
        return as_json(
            {"model": model.name, "num_experts": model.config.num_experts, "stacks": [dataclasses.asdict(s) for s in stacks]}
        )

    async def _called(self, request: Request, function: Callable[[], Any]) -> Any:
        """Returns what the engine's thread finds."""
        future = asyncio.wrap_future(self.engine.call(function))
        try:
            return await asyncio.wait_for(future, request.scope["deadline"] - time.monotonic())
        except TimeoutError:
            raise Refusal(408, f"The server did not come to this within {self.limits.timeout:g} s; ask again later.") from None

    async def chat(self, request: Request) -> Response:
        """Refuses chat by name."""
        raise Refusal(
            404,
            "Chat completions are not served: these models are encoder-decoders without turns. Send the text to /v1/completions.",
        )


class Stream(Response):
    """Completions as server-sent events, as they come."""

    def __init__(self, server: Server, answer: Answer, request: Request):
        self.server, self.answer, self.request, self.background = server, answer, request, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends an event for each piece of text; an error after the beginning is an event, too."""
        begun = False

        async def event(value: Any) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            text = value if isinstance(value, str) else json.dumps(value)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            async for index, text in self.server.pieces(self.answer, self.request):
                await event(self.answer.event(index, text))
            if self.answer.request.include_usage:
                await event({**self.answer.head([]), "usage": self.answer.usage()})
            await event("[DONE]")
        except Refusal as refusal:
            if not begun:
                raise
            await event(bytes(refused(refusal).body).decode())
        finally:
            self.server.leave(self.answer)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def build_app(server: Server, key: str | None = None, local: bool = True) -> Starlette:
    """Returns the application. key: what clients must send. local: whether it answers to names of this machine alone."""
    routes = [
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.counted, methods=["GET"]),
        Route("/v1/models", server.list_models, methods=["GET"]),
        Route("/v1/models/{name}", server.one_model, methods=["GET"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/embeddings", server.embed, methods=["POST"]),
        Route("/v1/routing", server.route, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    paths = tuple(route.path for route in routes)
    errors: Any = {HTTPException: _no_path, ConfigError: _bad, CheckpointError: _unreadable}
    errors |= {Refusal: _refused, Full: _full, Closing: _closing}
    guard = Middleware(Guard, limits=server.limits, metrics=server.metrics, key=key, local=local, paths=paths)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=errors, lifespan=server.lifespan)


async def _no_path(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        return refused(Refusal(405, f"This path takes {error.headers['Allow'] if error.headers else 'another method'}."))
    return refused(Refusal(error.status_code, "There is no such path; there are /v1/completions, /v1/embeddings and /v1/models."))


async def _bad(request: Request, error: ConfigError) -> Response:
    return refused(Refusal(400, str(error)))


async def _unreadable(request: Request, error: CheckpointError) -> Response:
    log.error("%s", error)
    return refused(Refusal(500, "The model cannot be read; the server's log says why."))


async def _refused(request: Request, error: Refusal) -> Response:
    return refused(error)


async def _full(request: Request, error: Full) -> Response:
    return refused(Refusal(429, "As many requests wait as this server lets wait; ask again later.", **{"retry-after": "1"}))


async def _closing(request: Request, error: Closing) -> Response:
    return refused(Refusal(503, _CLOSING, **{"retry-after": "5", "connection": "close"}))
