"""The composition root: names the concrete classes, joins them, and runs until told to stop."""

import asyncio
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import Callable

import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import generate_latest

from server.config import EMBEDDED, EMBEDDED_NAME, Config, cache_folder
from server.engine import Engine
from server.errors import error_response
from server.identity import identity
from server.logs import configure
from server.metrics import Metrics
from server.openai import ROUTES, OpenAI, unavailable
from server.upstream import Upstream, Upstreams
from tiers import Chain, DiskCache, Flights, MemoryCache, Tier

logger = logging.getLogger(__name__)
access = logging.getLogger("tierserve.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    configure(config.log)
    model = config.model.source
    if model == EMBEDDED:
        folder = cache_folder() / "models" / EMBEDDED_NAME
        if not config.engine.upstreams and not (folder / "config.json").is_file():
            logger.error("model.source: the embedded model is not prepared; run scripts/serve")
            return 2
        model = str(folder)
    try:
        return uvloop.run(_serve(config, model))
    except OSError as exc:
        logger.error("can't serve: %s", exc)
        return 1


async def _serve(config: Config, model: str) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stopper(stop))
    timeout_s = config.engine.timeout_s
    # Hashing weights takes long, and nothing is served yet.
    known_by = await asyncio.to_thread(identity, config, model)
    chain = _chain(config)
    engine = None if config.engine.upstreams else Engine(config, model)
    upstreams = Upstreams(
        [engine.upstream]
        if engine is not None
        else [Upstream(url, timeout_s=timeout_s) for url in config.engine.upstreams]
    )
    flights = Flights(max_bytes=4 * config.cache.max_answer_bytes)
    metrics = Metrics(chain, ready=lambda: upstreams.ready)
    road = OpenAI(
        chain=chain,
        flights=flights,
        upstreams=upstreams,
        identity=known_by,
        model=config.model.name,
        cache_all=config.cache.nondeterministic == "always",
    )
    runner = web.AppRunner(
        _app(config, road, upstreams, metrics), handler_cancellation=True, access_log=None
    )
    tasks = [asyncio.create_task(upstream.watch()) for upstream in upstreams.all]
    try:
        await runner.setup()
        site = web.TCPSite(runner, config.server.host, config.server.port, backlog=1024)
        await site.start()
        logger.info("listening on http://%s:%d", config.server.host, config.server.port)
        if engine is not None:
            tasks.append(asyncio.create_task(engine.run()))
        await stop.wait()
        logger.info("stopping; a second signal ends at once")
        await site.stop()
        await flights.finish(config.server.shutdown_grace_s)
    finally:
        await runner.cleanup()
        await chain.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await upstreams.close()
    return 0


def _stopper(stop: asyncio.Event) -> Callable[[], None]:
    def on_signal() -> None:
        if stop.is_set():
            # The guard ends the engine when it notices that we are gone.
            os._exit(130)
        stop.set()

    return on_signal


def _chain(config: Config) -> Chain:
    tiers = []
    if (memory := config.tiers.memory) is not None:
        tiers.append(Tier("memory", MemoryCache(memory.max_bytes)))
    if (disk := config.tiers.disk) is not None and disk.path is not None:
        tiers.append(Tier("disk", DiskCache(disk.path, disk.max_bytes)))
    cache = config.cache
    return Chain(tiers, ttl_s=cache.ttl_s, max_answer_bytes=cache.max_answer_bytes)


def _app(config: Config, road: OpenAI, upstreams: Upstreams, metrics: Metrics) -> web.Application:
    app = web.Application(
        client_max_size=config.server.max_body_bytes, middlewares=[_middleware(metrics)]
    )

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def ready(_: web.Request) -> web.Response:
        return web.Response() if upstreams.ready else unavailable()

    async def own_metrics(_: web.Request) -> web.Response:
        text = generate_latest(metrics.registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def engine_metrics(http: web.Request) -> web.StreamResponse:
        return await road.forward(http, path="/metrics")

    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", own_metrics)
    app.router.add_get("/metrics/engine", engine_metrics)
    for route in ROUTES:
        app.router.add_post(route, road.answer)
    app.router.add_route("*", "/{path:.*}", road.forward)
    return app


def _middleware(metrics: Metrics) -> Middleware:
    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request["id"] = given if _REQUEST_ID(given) else uuid.uuid4().hex
        request["outcome"] = ("none", "own")
        started = time.perf_counter()
        status = 499
        try:
            response = await handler(request)
            status = response.status
        except web.HTTPRequestEntityTooLarge:
            response = error_response(413, "The body is larger than server.max_body_bytes allows.")
            status = 413
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            logger.exception("a request failed")
            response = error_response(500, "Internal error.")
            status = 500
        finally:
            seconds = time.perf_counter() - started
            tier, outcome = request["outcome"]
            metrics.observe(tier, outcome, seconds)
            if access.isEnabledFor(logging.INFO):
                access.info(
                    "%s %s %d", request.method, request.path, status,
                    extra={
                        "request_id": request["id"], "tier": tier, "outcome": outcome,
                        "ms": round(seconds * 1000, 3),
                    },
                )  # fmt: skip
        if not response.prepared:
            response.headers.setdefault("X-Request-Id", request["id"])
        return response

    return around
