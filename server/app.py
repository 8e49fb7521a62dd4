"""The composition root: builds the server of its concrete classes, and runs it until stopped.

Where there are several processes, `server.workers` composes them of the same parts.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.registry import Collector

from server.admin.api_document import build_admin_document
from server.admin.export_format import max_line_bytes
from server.admin.handler import AdminHandler, Report
from server.admin.local import LocalOperations
from server.admin.operations import AdminOperations
from server.admin.sockets import serve_admin_api
from server.audit.acts import Audit
from server.auth.collector import TenantCollector
from server.auth.tenants import Tenants
from server.cache import TierStack, build_answers, open_stack
from server.config.base import VERSION
from server.config.load import redact
from server.config.reload import Reloadable, ReloadCollector, Reloads, RunningConfig
from server.config.schema import Config
from server.engine.collector import (
    EngineCollector,
    ModelState,
    UpstreamCollector,
    UpstreamState,
)
from server.engine.models import Models, ServedModels
from server.engine.vllm_options import engine_keeps_responses
from server.handlers.cached import CachedRoutes, CachingPolicy
from server.handlers.engine_metrics import EngineMetrics
from server.handlers.generation import Engines
from server.handlers.hits import Hits
from server.handlers.model_list import ModelList
from server.handlers.proxied import ProxiedRoutes
from server.handlers.readiness import Readiness
from server.handlers.variants import Variants
from server.pages.openapi import build_document
from server.pages.openapi_handler import OpenApiHandler
from server.pages.overview import Overview
from server.prefix_tier.build import build_prefix_tier, prefix_options
from server.prefix_tier.collector import PrefixCollector
from server.prefix_tier.tier import PrefixTier
from server.process import Draining, ServiceManager, Tasks, handle_signals
from server.protocol.cache_control import FreshnessRules
from server.protocol.routes import CACHED_ROUTES
from server.router import Handlers, Router, admin_endpoints
from server.telemetry.finished import EnginePrompts, FinishedRequests
from server.telemetry.logs import AccessLog
from server.telemetry.metrics import Metrics
from server.telemetry.prefixes import Prefixes
from server.web.access import AccessCheck, AccessControl
from server.web.inherited_sockets import InheritedSockets
from server.web.known_requests import KnownRequests, KnownRequestsCollector
from server.web.listener import addresses, end_connections, listen, listen_at, make_server
from server.web.middleware import Middleware, request_ids
from server.web.outputs import Outputs, open_outputs
from server.web.request import Endpoint, HttpRequest
from server.web.tls import Certificate
from tiers import Chain, SingleFlight
from tiers.disk import EncryptionKeyError, UntrustedError

logger = logging.getLogger(__name__)

# For answers that ended just now: a commit takes milliseconds.
_STORE_S = 5
# For everything that is still to be written; a disk that hangs must not delay the exit further.
_CLOSE_S = 20
CLOSING_S = 2.0 * (_STORE_S + _CLOSE_S)
"""How long a process may take to end, after its last request."""
# Of a connection that is accepted, the handler begins some turns of the event loop later.
_TURNS_TO_BEGIN = 5
# Requests leave few cycles behind, so collections are rare. But the event loop waits for each, half
# a microsecond for every object that it walks over: objects of requests under way often, the oldest
# ones, such as entries in memory, once in five million allocations.
_GC_THRESHOLDS = 5_000, 10, 100


def serve(config: Config, file: Path, inherited: InheritedSockets) -> int:
    """Serve until SIGTERM or SIGINT, in this process; returns the exit status.

    Args:
        config: describes the server.
        file: holds it, and is read again when it changes.
        inherited: sockets that listen already.

    Raises:
        ConfigError: files or the engine that the configuration names can't be used.
    """
    tenants = Tenants(config.tenants)
    certificate = None if config.server.tls is None else Certificate(config.server.tls)
    with open_outputs(config) as outputs:
        try:
            return uvloop.run(_run(config, file, tenants, certificate, outputs, inherited))
        except OSError as exc:
            logger.error("can't serve: %s", exc.strerror or exc)
            return 1


async def _run(
    config: Config,
    file: Path,
    tenants: Tenants,
    certificate: Certificate | None,
    outputs: Outputs,
    inherited: InheritedSockets,
) -> int:
    # First, since it can't notice a change before its first look at the files.
    running = RunningConfig(file, config, lambda changed: server.use(changed))
    parts: list[Reloadable] = [running, tenants]
    if certificate is not None:
        parts.append(certificate)
    reloads = Reloads(parts, outputs.audit.reloaded)
    # Before signals are waited for: it reads files, and may ask a hub.
    models = Models(config.models, prefix_options(config))
    stop, draining = asyncio.Event(), Draining()
    handle_signals(stop, draining, config.server.drain_s, reloads.ask)
    manager = ServiceManager()
    draining.then(lambda: announce_stop(manager))
    tls = None if certificate is None else certificate.context
    stack = await open_stack(config)
    prefix_tier = build_prefix_tier(config, stack.chain.purges, tenants)
    server = Server(
        config,
        tenants,
        models,
        stack,
        outputs,
        draining,
        prefix_tier=prefix_tier,
        reloads=reloads,
    )
    tasks = Tasks(stop)
    tasks.start(reloads.watch(), manager.keep_alive(), *watches(models, prefix_tier))

    async def listen_at_address(
        server: web.Server, known: KnownRequests | None
    ) -> Sequence[asyncio.Server]:
        options, sockets = config.server, inherited.front
        if sockets:
            listeners = [await listen_at(server, each, options, tls, known) for each in sockets]
        else:
            listeners = [await listen(server, options.host, options.port, options, tls, known)]
        logger.info("listening on %s", ", ".join(addresses(each, tls) for each in listeners))
        return listeners

    @asynccontextmanager
    async def manage() -> AsyncIterator[None]:
        admin = serve_admin_api(
            config, server.admin_endpoints(), tls, outputs.audit, inherited.admin
        )
        async with outputs.audit.lifetime(version=VERSION, workers=1), admin:
            tasks.start(server.open_tiers(), *models.runs())
            manager.notify("READY=1")
            yield

    try:
        has_stored = await server.run(stop, listen_at_address, manage)
    finally:
        has_closed = await close(tasks, models, prefix_tier)
    end_at_once_unless(has_stored and has_closed, outputs)
    return int(tasks.failed)


Listen = Callable[[web.Server, KnownRequests | None], Awaitable[Sequence[asyncio.Server]]]
"""Makes the listeners of clients, some of whose requests are known."""


class Server:
    """What answers clients in one process: alone, or as one of several workers.

    Args:
        config: describes it.
        tenants: the clients that are allowed.
        models: generate answers.
        stack: the tiers, and what moves entries between them.
        outputs: the logs, the trace, and the spans.
        draining: whether it is about to stop.
        prefix_tier: is shown and purged, if this process has it.
        reloads: are reported, if this process reads files again.
        together: what holds for all processes, where there are several.
        started_at: when the server began (Unix s).
    """

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        models: ServedModels,
        stack: TierStack,
        outputs: Outputs,
        draining: Draining,
        *,
        prefix_tier: PrefixTier | None = None,
        reloads: Reloads | None = None,
        together: "Together | None" = None,
        started_at: float | None = None,
    ) -> None:
        self._config, self._models, self._stack = config, models, stack
        self._outputs, self._prefix_tier = outputs, prefix_tier
        self.draining, self._has_opened = draining, False
        self._flights = SingleFlight(
            max_bytes=4 * config.cache.max_answer_bytes, is_purged=stack.chain.purges.is_purged
        )
        access = AccessControl(tenants, outputs.audit)
        self.known = KnownRequests() if config.server.known_requests else None
        if self.known is not None:
            draining.then(self.known.forget)
        draining.then(models.end_waits)
        self.prefixes = Prefixes()
        self.metrics = build_metrics(
            stack,
            models,
            prefix_tier,
            TenantCollector(lambda: tenants.limiters, lambda: access.unauthorized),
            KnownRequestsCollector(self.known),
            *([] if reloads is None else [ReloadCollector(reloads)]),
        )
        self._access_log = AccessLog(config.log, outputs.log)
        self._finished = finished = FinishedRequests(
            self.metrics,
            self._access_log,
            outputs.trace,
            traces_spans=config.tracing is not None,
        )
        self.overview = Overview(
            chain=stack.chain,
            finished=finished,
            models=models,
            version=VERSION,
            prefix_tier=prefix_tier,
        )
        if together is None:
            metrics = exposition(self.metrics.registry)
            together = Together(metrics, self.overview.answer, Variants())
        ids = request_ids()
        self._cached = self._cached_routes(tenants, ids, together.variants)
        handlers = Handlers(
            cached=self._cached,
            proxied=ProxiedRoutes(models, config.server.max_prompts),
            readiness=Readiness(
                models, config.server.ready, draining, tiers_serve=lambda: self._has_opened
            ),
            model_list=ModelList(models, time.time() if started_at is None else started_at),
            metrics=together.metrics,
            engine_metrics=EngineMetrics(models),
            overview=together.overview,
            document=self._document(has_keys=not tenants.is_open),
        )
        self._middleware = Middleware(finished, ids)
        self._router = Router(
            handlers,
            self._middleware,
            access,
            outputs.traced,
            open_metrics=config.tenants.open_metrics,
        )

    def _cached_routes(
        self, tenants: Tenants, ids: Iterator[str], variants: Variants
    ) -> CachedRoutes:
        answers = build_answers(self._config, self._stack, self._flights)
        hits = Hits(
            answers,
            self._models.names,
            tenants,
            ids,
            self._finished,
            remembers=self._config.server.known_requests,
        )
        return CachedRoutes(
            answers,
            self._engines(),
            self._policy(),
            variants,
            # Only what is parsed step by step has spans.
            hits if self._config.tracing is None else None,
        )

    def _engines(self) -> Engines:
        cache = self._config.cache
        return Engines(
            self._models,
            FreshnessRules(cache).of,
            cache.obey_upstreams,
            self._flights.max_bytes,
            EnginePrompts(self.prefixes, self._outputs.trace),
        )

    def _policy(self) -> CachingPolicy:
        cache, models = self._config.cache, self._config.models
        environments = (os.environ, *(model.engine.env for model in models.values()))
        return CachingPolicy(
            cache.nondeterministic,
            cache.variants,
            engine_keeps_responses(environments),
            self._config.server.max_prompts,
        )

    def use(self, config: Config) -> None:
        """Put a configuration into effect in which only fields have changed that can.

        Raises:
            OSError: there is no memory for a tier of this size; nothing has changed.
        """
        # First, since nothing else can fail.
        self._stack.use(config)
        self._config = config
        self._access_log.set_level(config.log.level)
        self._cached.use(self._engines(), self._policy())
        self._models.use(config.models)

    def _document(self, *, has_keys: bool) -> OpenApiHandler:
        make = partial(
            build_document,
            kept=CACHED_ROUTES,
            version=VERSION,
            has_keys=has_keys,
            open_metrics=self._config.tenants.open_metrics,
        )
        return OpenApiHandler(self._models, make)

    def admin_endpoints(self) -> Callable[[AccessCheck], Endpoint]:
        """Return what makes the admin API's endpoint in a process that serves alone."""
        reports = {"/overview": self.overview.for_operator, "/prefixes": self.prefixes.report}
        operations = LocalOperations(self._stack.chain, prefix_tier=self._prefix_tier)
        admin = build_admin_handler(lambda: self._config, operations, self._outputs.audit, reports)
        return admin_endpoints(admin, self._middleware)

    async def open_tiers(self) -> None:
        """Wait until the tiers can be read, or never can; then they serve.

        Raises:
            EncryptionKeyError: the disk tier's file needs another key.
        """
        await check_encryption_key(self._stack.chain)
        self._has_opened = True

    async def run(
        self,
        stop: asyncio.Event,
        listen: Listen,
        manage: Callable[[], AbstractAsyncContextManager[None]],
    ) -> bool:
        """Serve until `stop` is set; returns whether all was stored in time.

        Args:
            stop: ends it.
            listen: makes the listeners of clients.
            manage: is entered once they listen, and left at the stop.

        Raises:
            OSError: an address can't be used.
        """
        options = self._config.server
        server = make_server(self._router.front(options.allowed_origins), options, self.draining)
        try:
            await self._stack.background.start()
            listeners = await listen(server, self.known)
            # Objects that exist now stay: collecting them again and again would slow hits by 5%.
            gc.freeze()
            gc.set_threshold(*_GC_THRESHOLDS)
            async with manage():
                await stop.wait()
                # Unless a signal has had it begin.
                self.draining.begin()
                for listener in listeners:
                    listener.close()
                for _ in range(_TURNS_TO_BEGIN):
                    await asyncio.sleep(0)
        finally:
            # Responses end or are cut within the grace; the answers that they leave are stored.
            await end_connections(server, options.shutdown_grace_s)
            await self._flights.drain(_STORE_S)
            has_stored = await ends_in_time(self._stack.close())
            self._finished.flush()
        return has_stored


@dataclass(frozen=True, slots=True)
class Together:
    """What holds for all processes of a server."""

    metrics: Endpoint
    overview: Endpoint
    variants: Variants


def build_metrics(
    stack: TierStack,
    models: ServedModels,
    prefix_tier: PrefixTier | None,
    *more: Collector,
) -> Metrics:
    """Return the metrics of a process."""
    collectors: list[Collector] = [
        EngineCollector(
            lambda: [
                ModelState(
                    model.name,
                    model.state,
                    model.restarts,
                    model.upstreams.in_flight,
                    model.upstreams.held.found_none,
                    model.upstreams.held.waiting,
                )
                for model in models.all
            ]
        ),
        UpstreamCollector(
            lambda: [
                UpstreamState(
                    model.name,
                    each.upstream.label,
                    each.upstream.takes_requests,
                    each.load.active,
                    each.load.counts,
                )
                for model in models.all
                for each in model.upstreams.members
            ]
        ),
        *more,
    ]
    if prefix_tier is not None:
        own = [model.name for model in models.all if not model.config.upstreams]
        collectors.append(PrefixCollector(lambda: prefix_tier.report, own))
    return Metrics(
        stack.chain,
        demotions_dropped=lambda: stack.background.dropped,
        lock_stats=stack.lock.stats,
        collectors=collectors,
        fallbacks=models.fallbacks(),
    )


def build_admin_handler(
    config: Callable[[], Config],
    operations: AdminOperations,
    audit: Audit,
    reports: Mapping[str, Report],
) -> AdminHandler:
    """Return the handler of the admin API; `config` returns the configuration in effect."""
    of_config: Mapping[str, Report] = {
        "/config": lambda: redact(config().model_dump(mode="json")),
        "/openapi.json": partial(build_admin_document, VERSION),
    }
    return AdminHandler(
        operations,
        audit,
        max_line_bytes=max_line_bytes(config()),
        reports={**reports, **of_config},
    )


def exposition(registry: Collector) -> Endpoint:
    """Return the endpoint that answers with the metrics of a registry."""

    async def metrics(_: HttpRequest) -> web.Response:
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    return metrics


def watches(models: Models, prefix_tier: PrefixTier | None) -> Iterator[Coroutine[Any, Any, None]]:
    """Yield the tasks that watch the engines and keep the prefix tier, until cancelled."""
    yield from models.watches()
    if prefix_tier is not None:
        yield prefix_tier.run()
        for model in models.all:
            if (warm := model.warm_start(prefix_tier.reading)) is not None:
                yield warm.run()


async def close(tasks: Tasks, models: ServedModels, prefix_tier: PrefixTier | None = None) -> bool:
    """End the tasks, and with them the engines; returns whether all was stored in time."""
    await tasks.cancel()
    await models.close()
    return prefix_tier is None or await ends_in_time(prefix_tier.close(ended_engines=True))


def announce_stop(manager: ServiceManager) -> None:
    """Tell the service manager and the log that this process stops."""
    manager.notify("STOPPING=1")
    logger.info("stopping; a second signal ends at once")


def end_at_once_unless(has_stored: bool, outputs: Outputs) -> None:
    """End the process if a thread hangs at a disk, which would keep the process from exiting."""
    if not has_stored:
        outputs.close()
        os._exit(1)


async def ends_in_time(closing: Awaitable[None]) -> bool:
    """Wait for the tiers to close, for a limited time; returns whether they have."""
    try:
        async with asyncio.timeout(_CLOSE_S):
            await closing
    except TimeoutError:
        logger.error("the tiers did not close in %d s; what was not stored is lost", _CLOSE_S)
        return False
    return True


async def check_encryption_key(chain: Chain) -> None:
    """Fail if the disk tier's file turns out to need another key, once it is open."""
    for tier in chain.tiers:
        try:
            await tier.opened()
        except EncryptionKeyError:
            raise
        except (OSError, UntrustedError):
            # The reason is logged already; the server runs without that tier.
            return
