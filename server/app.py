"""The composition root: names the concrete classes, joins them, and runs until told to stop."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from functools import partial
from math import inf
from typing import Any

import uvloop
from aiohttp import web

from server.admin.api_document import document as admin_document
from server.admin.exports import max_line_bytes
from server.admin.handler import Admin
from server.admin.local import Administration
from server.admin.sockets import administered
from server.auth.tenants import Tenants
from server.cache import FreshnessRules, build, build_turns
from server.config.base import VERSION, ConfigError
from server.config.load import redact
from server.config.reload import Reloads
from server.config.schema import Config
from server.engine.models import Models
from server.handlers.cached import CachedRoutes
from server.handlers.proxied import ProxiedRoutes
from server.pages.document import Document
from server.pages.files import FRONT, Files
from server.pages.openapi import document
from server.pages.overview import Overview
from server.protocol.routes import ROUTES, engine_keeps_responses
from server.router import _admin_door, _owned, _pages, _router, _routes
from server.telemetry.history import History
from server.telemetry.logs import AccessLog, LogStream, configure
from server.telemetry.metrics import Metrics
from server.telemetry.prefixes import Prefixes
from server.telemetry.trace_log import TraceLog
from server.web.access import AccessCheck, AccessControl, allow_anyone
from server.web.cors import answer_preflight, with_cors
from server.web.listener import addresses, listen, make_server
from server.web.middleware import wrap
from server.web.request import Handler, Traced
from server.web.tls import Certificate
from tiers import BackgroundWork, Chain, DiskCache, SingleFlight
from tiers.disk import EncryptionKeyError, UntrustedError

logger = logging.getLogger(__name__)

# One stop may come twice: from a service manager that signals all processes, and from our parent.
_ONE_STOP_S = 0.5
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
        ConfigError: files or the engine that the configuration names can't be used.
    """
    tenants = Tenants(config.tenants)
    certificate = None if config.server.tls is None else Certificate(config.server.tls)
    log = configure(config.log)
    trace = tracing = None
    traced: Traced = _untraced
    try:
        if config.log.trace is not None:
            trace = TraceLog(config.log.trace, config.log.trace_max_bytes)
        if config.tracing is not None:
            # Imported here, since it needs an extra.
            from server.web.tracing import Tracing

            tracing = Tracing(config.tracing)
            traced = tracing.traced
        return uvloop.run(_serve(config, tenants, certificate, log, trace, traced))
    except OSError as exc:
        logger.error("can't serve: %s", exc)
        return 1
    finally:
        if tracing is not None:
            tracing.close()
        if trace is not None:
            trace.close()
        log.close()


def _untraced(handler: Handler, _: str | None = None) -> Handler:
    return handler


async def _serve(
    config: Config,
    tenants: Tenants,
    certificate: Certificate | None,
    log: LogStream,
    trace: TraceLog | None,
    traced: Traced,
) -> int:
    # First of all, since a change before its first look is never seen.
    reloads = Reloads([tenants] if certificate is None else [tenants, certificate])
    # Before signals are waited for: it reads files, and may ask a hub.
    models = Models(config.models)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    on_stop = _stopper(stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, reloads.ask)
    tls = None if certificate is None else certificate.context
    chain, movement = build(config)
    try:
        turns = build_turns(config, chain)
    except ConfigError:
        # Else the disk tier's file would have to be verified.
        await chain.close()
        raise
    door = AccessControl(tenants)
    flights = SingleFlight(
        max_bytes=4 * config.cache.max_answer_bytes, purged=chain.purges.is_purged
    )
    metrics = Metrics(
        chain,
        models=lambda: [
            (model.name, model.state, model.restarts, model.upstreams.asked) for model in models.all
        ],
        dropped=lambda: movement.dropped,
        waits=turns.stats,
        accounts=lambda: tenants.limiters,
        turned_away=lambda: door.unauthorized,
    )
    history = History()
    overview = Overview(chain=chain, history=history, models=models, version=VERSION)
    prefixes = Prefixes()
    access = AccessLog(config.log, log)
    road = CachedRoutes(
        chain=chain,
        flights=flights,
        turns=turns,
        models=models,
        freshness=FreshnessRules(config.cache).of,
        nondeterministic=config.cache.nondeterministic,
        variants=config.cache.variants,
        obeys=config.cache.obey_upstreams,
        engine_keeps=engine_keeps_responses(
            (os.environ, *(model.engine.env for model in config.models.values()))
        ),
        max_prompts=config.server.max_prompts,
        prefixes=prefixes,
    )
    admin = Admin(
        Administration(chain),
        max_line_bytes=max_line_bytes(config),
        server={
            "/overview": overview.of_all,
            "/prefixes": prefixes.report,
            "/config": lambda: redact(config.model_dump(mode="json")),
            "/openapi.json": partial(admin_document, VERSION),
        },
    )

    def wrapped(handler: Handler, enter: AccessCheck) -> Handler:
        return wrap(handler, metrics, history, access, trace, enter=enter)

    described = partial(
        document,
        kept=ROUTES,
        version=VERSION,
        has_keys=not tenants.is_open,
        open_metrics=config.tenants.open_metrics,
    )
    readers = allow_anyone if config.tenants.open_metrics else door.require_operator
    others = ProxiedRoutes(models, config.server.max_prompts)
    owned = _owned(others, wrapped, metrics, readers)
    owned |= _pages(Files(FRONT), overview, Document(models, described), wrapped, door)
    routes = _routes(road, models, wrapped, traced, door)
    router = _router(routes, owned, others, models, wrapped, traced, door)
    router = with_cors(
        config.server.allowed_origins, router, wrapped(answer_preflight, allow_anyone)
    )
    server = make_server(router, config.server)
    runner = web.ServerRunner(server, shutdown_timeout=config.server.shutdown_grace_s)
    failures: list[BaseException] = []
    tasks: list[asyncio.Task[None]] = []

    def go_on(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda task: _watched(task, failures, stop))
        tasks.append(task)

    for watch in models.watches():
        go_on(watch)
    go_on(reloads.watch())
    try:
        await runner.setup()
        await movement.start()
        where = config.server
        listener = await listen(server, where.host, where.port, where, tls)
        logger.info("listening on %s", addresses(listener, tls))
        # What is there now stays: looking it over again and again would cost 5% of all hits.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        async with administered(config, _admin_door(admin, wrapped), tls):
            go_on(_unsealed(chain))
            for run in models.runs():
                go_on(run)
            await stop.wait()
            logger.info("stopping; a second signal ends at once")
            listener.close()
    finally:
        # Running answers end or are cut within the grace; what they leave is to be stored.
        await runner.cleanup()
        await flights.drain(_STORE_S)
        await turns.close()
        stored = await _closed(movement, chain)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await models.close()
        access.flush()
    if not stored:
        # The thread that hangs would keep the process.
        if trace is not None:
            trace.close()
        log.close()
        os._exit(1)
    return int(bool(failures))


async def _unsealed(chain: Chain) -> None:
    """Fail if the disk tier's file turns out to need another key, once it has been verified."""
    for tier in chain.tiers:
        if isinstance(tier.backend, DiskCache):
            try:
                await tier.backend.opened()
            except EncryptionKeyError:
                raise
            except (OSError, UntrustedError):
                # Said in the log; what goes on does so without that tier.
                return


async def _closed(movement: BackgroundWork, chain: Chain) -> bool:
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


def _stopper(
    stop: asyncio.Event, clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """Return what is done on a signal to stop; a second one ends us at once."""
    stopped_at = inf

    def on_signal() -> None:
        nonlocal stopped_at
        now = clock()
        if now > stopped_at + _ONE_STOP_S:
            # The guard ends the engine when it notices that we are gone.
            os._exit(130)
        stopped_at = min(stopped_at, now)
        stop.set()

    return on_signal
