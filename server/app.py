"""The composition root: names the concrete classes, joins them, and runs until told to stop."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from importlib.util import find_spec
from typing import Any

import uvloop
from aiohttp import web
from prometheus_client import generate_latest

from server.admin.api import Admin
from server.admin.exports import max_line_bytes
from server.admin.listener import administered
from server.admin.local import Administration
from server.chain import build, build_turns
from server.config import Config, ConfigError
from server.engine import Engine, EngineState
from server.freshness import FreshnessRules
from server.http_request import Handler, HttpRequest
from server.identity import Identity
from server.listener import listen, make_server
from server.logs import AccessLog, LogStream, configure
from server.metrics import Metrics
from server.middleware import wrap
from server.openai import OpenAI
from server.passthrough import forward
from server.responses import unavailable
from server.routes import ROUTES, keeps_responses
from server.trace_log import TraceLog
from server.upstream import UnavailableError, Upstream, Upstreams
from server.websocket import forward_websocket, is_asked_for
from server.weights import Weights, locate
from tiers import Chain, Flights, Movement

logger = logging.getLogger(__name__)

# For answers that ended just now: a commit takes milliseconds.
_STORE_S = 5
# For all that is still to be written; a disk that hangs must not keep us.
_CLOSE_S = 20
# Requests leave few cycles behind; a collection for each ten of them would be waste. But the event
# loop waits for it, and it walks over what is under way: half a microsecond an object. The oldest
# objects, entries in memory above all, are walked over once in five million.
_GC_THRESHOLDS = 5_000, 10, 100


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: the weights or the engine that the configuration names aren't there.
    """
    log = configure(config.log)
    trace = None
    try:
        if config.log.trace is not None:
            trace = TraceLog(config.log.trace, config.log.trace_max_bytes)
        weights = None
        if not config.engine.upstreams:
            if find_spec("vllm") is None:
                raise ConfigError(["engine: vLLM isn't installed; run scripts/setup"])
            weights = locate(config.model)
        return uvloop.run(_serve(config, log, trace, weights, Identity(config, weights)))
    except OSError as exc:
        logger.error("can't serve: %s", exc)
        return 1
    finally:
        if trace is not None:
            trace.close()
        log.close()


async def _serve(
    config: Config,
    log: LogStream,
    trace: TraceLog | None,
    weights: Weights | None,
    known_by: Identity,
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stopper(stop))
    timeout_s = config.engine.timeout_s
    engine = None if weights is None else Engine(config, weights)
    chain, movement = build(config)
    try:
        turns = build_turns(config, chain)
    except ConfigError:
        # Else the disk tier's file would have to be verified.
        await chain.close()
        raise
    upstreams = Upstreams(
        [engine.upstream]
        if engine is not None
        else [Upstream(url, timeout_s=timeout_s) for url in config.engine.upstreams],
        max_requests=config.engine.max_requests,
    )
    flights = Flights(max_bytes=4 * config.cache.max_answer_bytes, purged=chain.purges.cover)
    metrics = Metrics(
        chain,
        state=lambda: _state(engine, upstreams),
        restarts=lambda: engine.restarts if engine is not None else 0,
        dropped=lambda: movement.dropped,
        waits=turns.waits,
    )
    access = AccessLog(config.log, log)
    road = OpenAI(
        chain=chain,
        flights=flights,
        turns=turns,
        upstreams=upstreams,
        identity=known_by,
        model=config.model.name,
        freshness=FreshnessRules(config.cache).of,
        nondeterministic=config.cache.nondeterministic,
        variants=config.cache.variants,
        engine_keeps=keeps_responses((os.environ, config.engine.env)),
    )
    admin = Admin(Administration(chain), max_line_bytes=max_line_bytes(config))

    def wrapped(handler: Handler) -> Handler:
        return wrap(handler, metrics, access, trace)

    routes = _routes(road, upstreams, wrapped, metrics)
    server = make_server(routes, config.server)
    runner = web.ServerRunner(server, shutdown_timeout=config.server.shutdown_grace_s)
    failures: list[BaseException] = []
    tasks: list[asyncio.Task[None]] = []

    def go_on(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda task: _watched(task, failures, stop))
        tasks.append(task)

    for upstream in upstreams.all:
        go_on(upstream.watch())
    try:
        await runner.setup()
        await movement.start()
        listener = await listen(server, config.server)
        host, port = listener.sockets[0].getsockname()[:2]
        logger.info("listening on http://%s:%d", host, port)
        # What is there now stays: looking it over again and again would cost 5% of all hits.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        async with administered(config, wrapped(admin.answer)):
            if engine is not None:
                go_on(engine.run())
            await stop.wait()
            logger.info("stopping; a second signal ends at once")
            listener.close()
    finally:
        # Running answers end or are cut within the grace; what they leave is to be stored.
        await runner.cleanup()
        await flights.finish(_STORE_S)
        await turns.close()
        stored = await _closed(movement, chain)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await upstreams.close()
        access.flush()
    if not stored:
        # The thread that hangs would keep the process.
        if trace is not None:
            trace.close()
        log.close()
        os._exit(1)
    return int(bool(failures))


async def _closed(movement: Movement, chain: Chain) -> bool:
    try:
        async with asyncio.timeout(_CLOSE_S):
            await movement.close()
            await chain.close()
    except TimeoutError:
        logger.error("the tiers did not close in %d s; what was not stored is lost", _CLOSE_S)
        return False
    return True


def _watched(task: asyncio.Task[None], failures: list[BaseException], stop: asyncio.Event) -> None:
    """Stop, rather than go on without a part of us that ended by a mistake."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        logger.critical("a task of the server failed", exc_info=exc)
        failures.append(exc)
        stop.set()


def _state(engine: Engine | None, upstreams: Upstreams) -> EngineState:
    if engine is not None:
        return engine.state
    return EngineState.READY if upstreams.ready else EngineState.DOWN


def _stopper(stop: asyncio.Event) -> Callable[[], None]:
    def on_signal() -> None:
        if stop.is_set():
            # The guard ends the engine when it notices that we are gone.
            os._exit(130)
        stop.set()

    return on_signal


def _routes(
    road: OpenAI,
    upstreams: Upstreams,
    wrapped: Callable[[Handler], Handler],
    metrics: Metrics,
) -> Handler:
    """Return the handler of all requests."""

    async def health(_: HttpRequest) -> web.Response:
        return web.Response()

    async def ready(_: HttpRequest) -> web.Response:
        return web.Response() if upstreams.ready else unavailable(UnavailableError())

    async def own_metrics(_: HttpRequest) -> web.Response:
        text = generate_latest(metrics.registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def engine_metrics(http: HttpRequest) -> web.StreamResponse:
        return await forward(http, upstreams, path="/metrics")

    async def other(http: HttpRequest) -> web.StreamResponse:
        if is_asked_for(http):
            return await forward_websocket(http, upstreams)
        return await forward(http, upstreams)

    by_path = {
        "/health": wrapped(health),
        "/ready": wrapped(ready),
        "/metrics": wrapped(own_metrics),
        "/metrics/engine": wrapped(engine_metrics),
    }
    routes = {(method, path): by_path[path] for method in ("GET", "HEAD") for path in by_path}
    routes |= {("POST", path): wrapped(road.answer) for path in ROUTES}
    rest = wrapped(other)

    def route(http: HttpRequest) -> Awaitable[web.StreamResponse]:
        # Most paths are found as they were sent, which spares making URLs of them.
        handler = routes.get((http.method, http.raw_path)) or routes.get((http.method, http.path))
        return (handler or rest)(http)

    return route
