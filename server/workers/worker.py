"""A worker: `python -m server.workers.worker`, started by the master with a `Setup`.

It answers clients as a server alone does, and leaves to the master what only one process can do: it
runs no engine and has no admin listener. The master decides when it ends, so it ignores signals;
where the master is gone, it ends at once, since its engines end, too.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlencode

import orjson
import uvloop
from aiohttp import web

from server.app import Server, Together, close, end_at_once_unless
from server.auth.limits import Limits, RateLimiter
from server.auth.tenants import Tenants
from server.cache import open_stack
from server.config.base import ConfigError
from server.engine.followed import FollowedModels, ModelReport
from server.handlers.variants import Variants
from server.process import Draining, Tasks, ignore_signals
from server.web.known_requests import KnownRequests
from server.web.listener import listen_at
from server.web.outputs import Outputs, open_outputs
from server.web.request import HttpRequest
from server.web.responses import RETRY_AFTER_S, error_response
from server.web.tls import Certificate
from server.workers.link import Link, LinkError
from server.workers.orders import Orders
from server.workers.setup import Setup
from server.workers.shared_counters import SharedCounters

logger = logging.getLogger(__name__)

_TELL_AGAIN_S = 0.5
# The server ends where a first worker gives up, and engines that load beside it take all CPUs.
_START_S = 120.0


def main() -> int:
    """Run a worker to its end, and return its exit status."""
    ignore_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    setup = Setup.read(sys.stdin.buffer)
    threading.Thread(target=_end_with_master, daemon=True).start()
    try:
        with open_outputs(setup.config) as outputs:
            return uvloop.run(_run(setup, outputs))
    except ConfigError as exc:
        print(*exc.mistakes, sep="\n", file=sys.stderr)  # noqa: T201
        return 2


def _end_with_master() -> None:
    # Not through sys.stdin: a thread must not hold its lock when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


class _Master:
    """The master, as its worker sees it. It is an `EngineProcess`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._telling: dict[tuple[str, str], asyncio.Task[None]] = {}

    def note_unreachable(self, model: str, upstream: str, exc: Exception) -> None:
        if (failed := (model, upstream)) not in self._telling:
            told = {"model": model, "upstream": upstream, "why": getattr(exc, "strerror", None)}
            self._telling[failed] = task = asyncio.create_task(self._tell("/unreachable", told))
            task.add_done_callback(lambda _: self._telling.pop(failed))

    async def has_run_since(self, model: str, since: float) -> bool:
        try:
            answer = await self._link.call(
                "GET", "/ran-since", params={"model": model, "since": repr(since)}
            )
        except LinkError as exc:
            logger.warning("an answer is not stored: %s", exc)
            return False
        return bool(orjson.loads(answer))

    async def metrics(self, _: HttpRequest) -> web.Response:
        """Answer with the metrics of all processes."""
        return await self._ask("/metrics", "text/plain; version=0.0.4")

    async def overview(self, http: HttpRequest) -> web.Response:
        """Answer with the overview of all processes that the tenant may see."""
        tenant = http.tenant
        query = "" if tenant.operator else "?" + urlencode({"tenant": tenant.name})
        response = await self._ask("/overview" + query, "application/json")
        response.headers["Cache-Control"] = "no-store"
        return response

    async def _ask(self, path: str, content_type: str) -> web.Response:
        try:
            body = await self._link.call("GET", path)
        except LinkError as exc:
            logger.warning("%s", exc)
            text = "The server's other processes did not answer in time; try again."
            return error_response(503, text, retry_after_s=RETRY_AFTER_S)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _tell(self, path: str, told: Mapping[str, Any]) -> None:
        """Tell it until it answers: unless it knows, it never says that the upstream is back."""
        while True:
            try:
                await self._link.call("POST", path, told)
            except LinkError as exc:
                logger.warning("%s", exc)
                await asyncio.sleep(_TELL_AGAIN_S)
            else:
                return


async def _run(setup: Setup, outputs: Outputs) -> int:
    config, stop = setup.config, asyncio.Event()
    counters = SharedCounters.open(setup.counters, setup.number)

    def new_limiter(name: str, limits: Limits) -> RateLimiter:
        return RateLimiter(limits, new_usage=partial(counters.usage, f"tenant {name}"))

    tenants = Tenants(config.tenants, new_limiter, setup.records)
    certificate = None if config.server.tls is None else Certificate(config.server.tls)
    link = Link(socket.socket(fileno=setup.door), config.server)
    master = _Master(link)
    models = FollowedModels(
        config.models, setup.models, master, lambda name: counters.usage(f"model {name}")
    )
    stack = await open_stack(config)
    server = Server(
        config,
        tenants,
        models,
        stack,
        outputs,
        Draining(),
        together=Together(master.metrics, master.overview, Variants(counters.turns)),
        started_at=setup.started_at,
    )
    orders = Orders(config, server, models, tenants, certificate, stack, stop)
    tasks = Tasks(stop)

    async def listen(server: web.Server, known: KnownRequests | None) -> Sequence[asyncio.Server]:
        tls = None if certificate is None else certificate.context
        sockets = [socket.socket(fileno=file) for file in setup.listeners]
        return [await listen_at(server, each, config.server, tls, known) for each in sockets]

    @asynccontextmanager
    async def manage() -> AsyncIterator[None]:
        tasks.start(server.open_tiers())
        if orjson.loads(await link.call("POST", "/ready", within_s=_START_S)):
            server.draining.begin()
        yield

    try:
        await link.start(orders.answer)
        # An engine may have become ready since it was started; another worker may say so already.
        reports = orjson.loads(await link.call("GET", "/models", within_s=_START_S))
        models.follow([ModelReport.of_json(each) for each in reports])
        has_stored = await server.run(stop, listen, manage)
    finally:
        await close(tasks, models)
        await link.close()
    end_at_once_unless(has_stored, outputs)
    return int(tasks.failed)


if __name__ == "__main__":
    sys.exit(main())
