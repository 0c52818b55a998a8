"""What every request passes: host, key, size and time are checked, it is counted, and the log has a line without its text."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flax_switch.serving.limits import Limits
from flax_switch.serving.metrics import Metrics

log = logging.getLogger(__name__)

OPEN = ("/", "/health")  # for which no key is needed: they show nothing of what is served
_HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store", "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}  # fmt: skip
_READ = 8  # times the most that a body may have: so much is read, for who still sends does not see an answer
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not served: the status, and one sentence."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


def refused(refusal: Refusal) -> Response:
    """Returns a refusal as OpenAI's clients read it."""
    kind = _KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return as_json({"error": {"message": str(refusal), "type": kind, "param": None, "code": None}}, refusal.status, refusal.headers)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Returns a value as an answer."""
    return Response(json.dumps(value), status, headers, "application/json")


def is_loopback(host: str) -> bool:
    """Returns whether a name or an address is this machine's alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The ASGI application around the application."""

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics, key: str | None, local: bool, paths: tuple[str, ...]):
        """Takes what is allowed. local: only names of this machine are asked for. paths: those that are counted by name."""
        self.app, self.limits, self.metrics, self.key, self.local, self.paths = app, limits, metrics, key, local, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # a client that is gone before the answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        scope["deadline"] = time.monotonic() + self.limits.timeout
        try:
            self._check(scope)
            if scope["method"] == "POST":
                scope["body"] = await self._body(scope, receive)
            await self.app(scope, receive, counted)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, counted)
        except Gone:
            pass
        except Exception:
            log.exception("A request to %s failed.", scope["path"] if scope["path"] in self.paths else "another path")
            if status == 499:
                await refused(Refusal(500, "The server failed at this; its log says why."))(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            seconds = time.perf_counter() - started
            self.metrics.request(path, status, seconds)
            log.info("%s %s %d %.0f ms", scope["method"], path, status, 1000 * seconds)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
        if self.local and not is_loopback(host):
            # A page elsewhere whose name its owner has pointed at 127.0.0.1 must not reach this server through a browser.
            raise Refusal(400, "The Host header names another machine; this server answers to localhost and 127.0.0.1.")
        given = headers.get("authorization", "")
        if self.key is not None and scope["path"] not in OPEN:
            wanted = f"Bearer {self.key}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                said = "is not this server's" if given else "is missing"
                raise Refusal(
                    401, f"The API key {said}; send it as the header Authorization: Bearer KEY.", **{"www-authenticate": "Bearer"}
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal(415, "The body must be JSON: send the header Content-Type: application/json.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Returns the body, which must be within limits of size and time."""
        most, body = self.limits.max_body, bytearray()
        declared = Headers(scope=scope).get("content-length", "0")
        too_large = Refusal(413, f"The body has more than {most} bytes, which is all that this server takes.")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > _READ * most):
            raise too_large
        read = 0
        while True:
            try:
                message = await asyncio.wait_for(receive(), scope["deadline"] - time.monotonic())
            except TimeoutError:
                raise Refusal(408, f"The body did not arrive within {self.limits.timeout:g} s.") from None
            if message["type"] == "http.disconnect":
                raise Gone
            read += len(message.get("body", b""))
            if read <= most:
                body += message.get("body", b"")
            if read > _READ * most or (read > most and not message.get("more_body")):
                raise too_large
            if not message.get("more_body"):
                return bytes(body)


class Gone(Exception):
    """The client has left."""
