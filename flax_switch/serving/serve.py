"""Runs a server until it is told to end: models are loaded, programs compiled, then requests taken."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from types import FrameType

import jax
import uvicorn

from flax_switch.pretrained import Pretrained
from flax_switch.serving.app import Server, build_app
from flax_switch.serving.engine import Engine
from flax_switch.serving.guard import is_loopback
from flax_switch.serving.limits import Limits
from flax_switch.serving.models import Served

log = logging.getLogger(__name__)


def prepare(pretrained: Mapping[str, Pretrained], limits: Limits) -> Server:
    """Returns a server of models by name, all of whose programs are compiled.

    Those that are one model with different adapters (`Pretrained.use_adapter`) share its arrays.
    """
    models: dict[str, Served] = {}
    for name, one in pretrained.items():
        first = jax.tree.leaves(one.params)[0]
        like = next((served for n, served in models.items() if jax.tree.leaves(pretrained[n].params)[0] is first), None)
        models[name] = Served(name, one, limits, like)
    engine = Engine({name: model.decoder for name, model in models.items() if model.decoder is not None}, limits)
    slots = sum(x.nbytes for pool in engine.pools.values() for x in jax.tree.leaves(pool.slots.cache))
    log.info("Slots take %.0f MiB; compiling for sources of up to %s tokens.", slots / 2**20, ", ".join(map(str, limits.buckets)))
    engine.warm_up()
    for model in models.values():
        model.warm_up()
    return Server(models, engine, limits)


class _Uvicorn(uvicorn.Server):
    """Uvicorn, which on a signal refuses what has not begun, finishes what has, and ends."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]):
        super().__init__(config)
        self.drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends in good order; at once if asked a second time."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        asyncio.get_running_loop().call_soon_threadsafe(self.drain)


def run(server: Server, host: str, port: int, key: str | None = None, ready: Callable[[int], None] = lambda port: None) -> None:
    """Takes requests at an address until SIGTERM or SIGINT; `ready` is called with the port when it does."""
    app = build_app(server, key, local=is_loopback(host))
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=int(server.limits.timeout) + 1,
    )  # fmt: skip
    runner = _Uvicorn(config, server.engine.drain)

    async def serve() -> None:
        serving = asyncio.create_task(runner.serve())
        while not runner.started and not serving.done():
            await asyncio.sleep(0.01)
        if runner.started:
            ready(runner.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(serve())
