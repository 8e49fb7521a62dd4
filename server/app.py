"""The composition root: builds the server of its concrete classes, and runs it until stopped."""

import asyncio
import gc
import logging
import os
import signal
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import uvloop
from aiohttp import web

from server.admin.api_document import build_admin_document
from server.admin.export_format import max_line_bytes
from server.admin.handler import AdminHandler
from server.admin.local import LocalOperations
from server.admin.sockets import serve_admin_api
from server.auth.collector import TenantCollector
from server.auth.tenants import Tenants
from server.cache import TierStack, build_answers, open_stack
from server.config.base import VERSION
from server.config.load import redact
from server.config.reload import Reloads
from server.config.schema import Config
from server.engine.collector import EngineCollector
from server.engine.models import Models
from server.engine.vllm_options import engine_keeps_responses
from server.handlers.cached import CachedRoutes, CachingPolicy
from server.handlers.generation import Engines
from server.handlers.model_list import ModelList
from server.handlers.proxied import ProxiedRoutes
from server.pages.openapi import build_document
from server.pages.openapi_handler import OpenApiHandler
from server.pages.overview import Overview
from server.protocol.cache_control import FreshnessRules
from server.protocol.routes import CACHED_ROUTES
from server.router import Handlers, Router
from server.telemetry.finished import FinishedRequests
from server.telemetry.logs import AccessLog, LogStream, configure
from server.telemetry.metrics import Metrics
from server.telemetry.prefixes import Prefixes
from server.telemetry.trace_log import TraceLog
from server.web.access import AccessControl
from server.web.listener import addresses, listen, make_server
from server.web.middleware import Middleware
from server.web.request import Endpoint, Traced
from server.web.tls import Certificate
from tiers import Chain, SingleFlight
from tiers.disk import EncryptionKeyError, UntrustedError

logger = logging.getLogger(__name__)

# One stop may come twice: from a service manager that signals all processes, and from our parent.
_ONE_STOP_S = 0.5
# For answers that ended just now: a commit takes milliseconds.
_STORE_S = 5
# For everything that is still to be written; a disk that hangs must not delay the exit further.
_CLOSE_S = 20
# Requests leave few cycles behind, so collections are rare. But the event loop waits for each, half
# a microsecond for every object that it walks over: objects of requests under way often, the oldest
# ones, such as entries in memory, once in five million allocations.
_GC_THRESHOLDS = 5_000, 10, 100


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: files or the engine that the configuration names can't be used.
    """
    tenants = Tenants(config.tenants)
    certificate = None if config.server.tls is None else Certificate(config.server.tls)
    with ExitStack() as stack:
        log = configure(config.log)
        stack.callback(log.close)
        trace: TraceLog | None = None
        traced: Traced = _untraced
        if config.log.trace is not None:
            trace = TraceLog(config.log.trace, config.log.trace_max_bytes)
            stack.callback(trace.close)
        if config.tracing is not None:
            # Imported here, since it needs an extra.
            from server.web.tracing import Tracing

            tracing = Tracing(config.tracing)
            stack.callback(tracing.close)
            traced = tracing.traced
        outputs = Outputs(log, trace, traced)
        try:
            return uvloop.run(_run(config, tenants, certificate, outputs))
        except OSError as exc:
            logger.error("can't serve: %s", exc)
            return 1


async def _run(
    config: Config, tenants: Tenants, certificate: Certificate | None, outputs: "Outputs"
) -> int:
    # First, since it can't notice a change before its first look at the files.
    reloads = Reloads([tenants] if certificate is None else [tenants, certificate])
    # Before signals are waited for: it reads files, and may ask a hub.
    models = Models(config.models)
    stop = asyncio.Event()
    _handle_signals(stop, reloads)
    tls = None if certificate is None else certificate.context
    stack = await open_stack(config)
    return await Server(config, tenants, models, stack, reloads, outputs).run(stop, tls)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the server reports what it does, beside its metrics."""

    log: LogStream
    trace: TraceLog | None
    traced: Traced
    """Adds spans to requests, if they are traced."""

    def close(self) -> None:
        """Write what is queued."""
        if self.trace is not None:
            self.trace.close()
        self.log.close()


class Server:
    """All parts of a running server.

    Args:
        config: describes it.
        tenants: the clients that are allowed.
        models: generate answers.
        stack: the tiers, and what moves entries between them.
        reloads: watches the files that are read again.
        outputs: the log, the trace, and the spans.
    """

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        models: Models,
        stack: TierStack,
        reloads: Reloads,
        outputs: Outputs,
    ) -> None:
        self._config, self._models, self._stack = config, models, stack
        self._reloads, self._outputs = reloads, outputs
        self._flights = SingleFlight(
            max_bytes=4 * config.cache.max_answer_bytes, is_purged=stack.chain.purges.is_purged
        )
        self._access = AccessControl(tenants)
        self._access_log = AccessLog(config.log, outputs.log)
        self._prefixes = Prefixes()
        metrics = self._metrics(tenants)
        finished = FinishedRequests(
            metrics, self._access_log, outputs.trace, traces_spans=config.tracing is not None
        )
        overview = Overview(chain=stack.chain, finished=finished, models=models, version=VERSION)
        handlers = Handlers(
            cached=self._cached_routes(),
            proxied=ProxiedRoutes(models, config.server.max_prompts),
            model_list=ModelList(models),
            metrics=metrics,
            overview=overview,
            document=self._document(has_keys=not tenants.is_open),
        )
        self._router = Router(
            handlers,
            Middleware(finished),
            self._access,
            outputs.traced,
            open_metrics=config.tenants.open_metrics,
        )
        self._admin = self._admin_handler(overview)
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = False

    def _metrics(self, tenants: Tenants) -> Metrics:
        models, access, stack = self._models, self._access, self._stack
        return Metrics(
            stack.chain,
            demotions_dropped=lambda: stack.background.dropped,
            lock_stats=stack.lock.stats,
            collectors=[
                EngineCollector(
                    lambda: [
                        (model.name, model.state, model.restarts, model.upstreams.in_flight)
                        for model in models.all
                    ]
                ),
                TenantCollector(lambda: tenants.limiters, lambda: access.unauthorized),
            ],
        )

    def _cached_routes(self) -> CachedRoutes:
        cache, models = self._config.cache, self._config.models
        environments = (os.environ, *(model.engine.env for model in models.values()))
        return CachedRoutes(
            build_answers(self._config, self._stack, self._flights),
            Engines(
                self._models,
                FreshnessRules(cache).of,
                cache.obey_upstreams,
                self._flights.max_bytes,
                self._prefixes,
            ),
            CachingPolicy(
                cache.nondeterministic,
                cache.variants,
                engine_keeps_responses(environments),
                self._config.server.max_prompts,
            ),
        )

    def _document(self, *, has_keys: bool) -> OpenApiHandler:
        make = partial(
            build_document,
            kept=CACHED_ROUTES,
            version=VERSION,
            has_keys=has_keys,
            open_metrics=self._config.tenants.open_metrics,
        )
        return OpenApiHandler(self._models, make)

    def _admin_handler(self, overview: Overview) -> AdminHandler:
        config = self._config
        return AdminHandler(
            LocalOperations(self._stack.chain),
            max_line_bytes=max_line_bytes(config),
            reports={
                "/overview": overview.for_operator,
                "/prefixes": self._prefixes.report,
                "/config": lambda: redact(config.model_dump(mode="json")),
                "/openapi.json": partial(build_admin_document, VERSION),
            },
        )

    async def run(self, stop: asyncio.Event, tls: ssl.SSLContext | None) -> int:
        """Serve until `stop` is set; returns the exit status.

        Raises:
            OSError: an address can't be used.
        """
        options = self._config.server
        server = make_server(self._router.front(options.allowed_origins), options)
        runner = web.ServerRunner(server, shutdown_timeout=options.shutdown_grace_s)
        for work in (*self._models.watches(), self._reloads.watch()):
            self._start(work, stop)
        try:
            await runner.setup()
            await self._stack.background.start()
            listener = await listen(server, options.host, options.port, options, tls)
            logger.info("listening on %s", addresses(listener, tls))
            # Objects that exist now stay: collecting them again and again would slow hits by 5%.
            gc.freeze()
            gc.set_threshold(*_GC_THRESHOLDS)
            async with serve_admin_api(self._config, self._router.admin(self._admin), tls):
                self._start(_check_encryption_key(self._stack.chain), stop)
                for work in self._models.runs():
                    self._start(work, stop)
                await stop.wait()
                logger.info("stopping; a second signal ends at once")
                listener.close()
        finally:
            # Responses end or are cut within the grace; the answers that they leave are stored.
            await runner.cleanup()
            has_stored = await self._close()
        if not has_stored:
            # The thread that hangs would keep the process from exiting.
            self._outputs.close()
            os._exit(1)
        return int(self._failed)

    async def _close(self) -> bool:
        """Store what is left and close everything; returns whether all was stored in time."""
        await self._flights.drain(_STORE_S)
        has_stored = True
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._stack.close()
        except TimeoutError:
            logger.error("the tiers did not close in %d s; what was not stored is lost", _CLOSE_S)
            has_stored = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._models.close()
        self._access_log.flush()
        return has_stored

    def _start(self, work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
        """Run a background task of the server; if it fails, the server stops."""

        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (exc := task.exception()) is not None:
                logger.critical("a task of the server failed", exc_info=exc)
                self._failed = True
                stop.set()

        task = asyncio.create_task(work)
        task.add_done_callback(end)
        self._tasks.append(task)


def _untraced(endpoint: Endpoint, _: str | None = None) -> Endpoint:
    return endpoint


async def _check_encryption_key(chain: Chain) -> None:
    """Fail if the disk tier's file turns out to need another key, once it is open."""
    for tier in chain.tiers:
        try:
            await tier.opened()
        except EncryptionKeyError:
            raise
        except (OSError, UntrustedError):
            # The reason is logged already; the server runs without that tier.
            return


def _handle_signals(stop: asyncio.Event, reloads: Reloads) -> None:
    """Stop at SIGTERM and SIGINT, and read files again at SIGHUP."""
    loop = asyncio.get_running_loop()
    on_stop = _stop_handler(stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, reloads.ask)


def _stop_handler(
    stop: asyncio.Event, clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """Return a handler that sets `stop` at its first call, and ends the process at the second."""
    stopped_at = inf

    def on_stop() -> None:
        nonlocal stopped_at
        now = clock()
        if now > stopped_at + _ONE_STOP_S:
            # The watchdog ends the engine when this process has ended.
            os._exit(130)
        stopped_at = min(stopped_at, now)
        stop.set()

    return on_stop
