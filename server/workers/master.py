"""The master of workers: owns the listening sockets, the engines, the admin API and the metrics.

It answers no clients. It opens the disk tier, too: for the admin API, and so that a worker which is
killed isn't the last process that has the file open.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain as joined
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web
from pydantic import ByteSize

from server.admin.export_format import max_line_bytes
from server.admin.local import LocalOperations
from server.admin.sockets import serve_admin_api
from server.app import (
    announce_stop,
    build_admin_handler,
    build_metrics,
    check_encryption_key,
    close,
    end_at_once_unless,
    ends_in_time,
    watches,
)
from server.auth.tenants import TenantRecord, Tenants
from server.cache import TierStack, build
from server.config.base import VERSION
from server.config.reload import (
    Followed,
    Reloadable,
    ReloadCollector,
    Reloads,
    RunningConfig,
)
from server.config.schema import Config
from server.engine.followed import report_on
from server.engine.models import Models
from server.pages.overview import Overview
from server.prefix_tier.build import build_prefix_tier, prefix_options
from server.process import Draining, ServiceManager, Tasks, handle_signals
from server.router import admin_endpoints
from server.telemetry.finished import FinishedRequests
from server.telemetry.logs import AccessLog
from server.web.inherited_sockets import InheritedSockets
from server.web.listener import urls
from server.web.middleware import Middleware, request_ids
from server.web.outputs import Outputs, open_outputs
from server.web.request import HttpRequest
from server.web.tls import Certificate
from server.workers import sockets
from server.workers.child import WorkerError, WorkerProcess
from server.workers.link import LinkHandler
from server.workers.operations import WorkersOperations
from server.workers.reports import Reports
from server.workers.setup import Setup, dump_config, dump_records
from server.workers.shared_counters import SharedCounters
from tiers import GenerationLock

logger = logging.getLogger(__name__)

# Until a worker knows of an engine's state; what must be known at once, it asks for.
_TELL_EVERY_S = 0.05
_MIN_MEMORY_BYTES = 64 * 1024


def serve_with_workers(
    config: Config, file: Path, workers: int, inherited: InheritedSockets
) -> int:
    """Serve with that many workers until SIGTERM or SIGINT; returns the exit status.

    Args:
        config: describes the server.
        file: holds it, and is read again when it changes.
        workers: how many answer clients.
        inherited: sockets that listen already; all workers accept connections from the same ones.

    Raises:
        ConfigError: files or the engine that the configuration names can't be used.
    """
    tenants = Tenants(config.tenants)
    certificate = None if config.server.tls is None else Certificate(config.server.tls)
    with open_outputs(_of_master(config)) as outputs:
        try:
            bound = workers * [[*inherited.front]]
            if not inherited.front:
                bound = sockets.bind(config.server.host, config.server.port, workers)
            run = _run(config, file, tenants, certificate, outputs, bound, inherited.admin)
            return uvloop.run(run)
        except OSError as exc:
            logger.error("can't serve: %s", exc.strerror or exc)
            return 1


async def _run(
    config: Config,
    file: Path,
    tenants: Tenants,
    certificate: Certificate | None,
    outputs: Outputs,
    bound: Sequence[Sequence[socket.socket]],
    of_admin: Sequence[socket.socket],
) -> int:
    stop, draining = asyncio.Event(), Draining()
    # First, since it can't notice a change before its first look at the files.
    running = RunningConfig(file, config, lambda changed: use(changed))
    parts: list[Reloadable] = [running, Followed(tenants, lambda read: master.use_tenants(read))]
    if certificate is not None:
        parts.append(Followed(certificate, lambda _: master.use_certificate()))
    reloads = Reloads(parts, outputs.audit.reloaded)
    counters = SharedCounters.create(len(bound))
    models = Models(
        config.models, prefix_options(config), lambda name: counters.usage(f"model {name}")
    )
    master = _Master(config, tenants, models, counters, bound, stop, draining)
    handle_signals(stop, draining, config.server.drain_s, reloads.ask)
    manager = ServiceManager()
    draining.then(lambda: announce_stop(manager))
    tls = None if certificate is None else certificate.context
    # Without the rest of its background work, which would save counts of no requests.
    chain, background = build(_of_master(config))
    stack = TierStack(chain, background, GenerationLock(chain, [], wait_s=0))
    await background.share_purges()
    prefix_tier = build_prefix_tier(config, chain.purges, tenants)
    metrics = build_metrics(stack, models, prefix_tier, ReloadCollector(reloads))
    access_log = AccessLog(config.log, outputs.log)
    finished = FinishedRequests(metrics, access_log, None, traces_spans=False)
    overview = Overview(
        chain=chain, finished=finished, models=models, version=VERSION, prefix_tier=prefix_tier
    )
    master.reports = reports = Reports(master.workers, metrics.registry, overview.for_operator)
    operations = WorkersOperations(
        LocalOperations(chain, prefix_tier=prefix_tier),
        master.workers,
        has_memory=config.tiers.memory is not None,
        tells_workers=config.tiers.disk is None and config.tiers.shared is None,
        max_line_bytes=max_line_bytes(config),
    )

    def use(changed: Config) -> None:
        stack.use(_of_master(changed))
        access_log.set_level(changed.log.level)
        models.use(changed.models)
        master.use_config(changed)

    admin = build_admin_handler(
        lambda: running.now,
        operations,
        outputs.audit,
        {"/overview": reports.for_operator, "/prefixes": reports.prefixes},
    )
    tasks = Tasks(stop)
    draining.then(lambda: tasks.start(master.drain()))
    tasks.start(reloads.watch(), manager.keep_alive(), *watches(models, prefix_tier))
    tasks.start(master.tell(), reports.run())
    try:
        endpoints = admin_endpoints(admin, Middleware(finished, request_ids()))
        async with (
            outputs.audit.lifetime(version=VERSION, workers=len(bound)),
            serve_admin_api(config, endpoints, tls, outputs.audit, of_admin),
        ):
            tasks.start(check_encryption_key(chain), *models.runs(), *master.runs())
            await master.until_ready()
            if not stop.is_set():
                logger.info("listening on %s, with %d workers", urls(bound[0], tls), len(bound))
                manager.notify("READY=1")
            await stop.wait()
            draining.begin()
    finally:
        for each in joined(*bound):
            each.close()
        await master.end(config.server.shutdown_grace_s)
        has_stored = await ends_in_time(chain.close())
        has_stored &= await close(tasks, models, prefix_tier)
        finished.flush()
    end_at_once_unless(has_stored, outputs)
    return int(tasks.failed or master.failed)


class _Master:
    """What the master knows of its workers, and what each of them asks of it.

    Args:
        config: of the server.
        tenants: the clients that are allowed.
        models: the engines.
        counters: those that all workers share.
        bound: the listening sockets of each worker.
        stop: ends the server.
        draining: whether it is about to stop.
    """

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        models: Models,
        counters: SharedCounters,
        bound: Sequence[Sequence[socket.socket]],
        stop: asyncio.Event,
        draining: Draining,
    ) -> None:
        self._models, self._counters, self._stop = models, counters, stop
        self._draining = draining
        self._config = _of_worker(config, models, len(bound))
        self._started_at = time.time()
        self._records = tenants.records
        self._state: dict[str, Any] = {
            "/models": [*report_on(models)],
            "/config": dump_config(self._config),
            "/tenants": dump_records(self._records),
            "/certificate": [0],
        }
        self.failed = False
        """Whether a worker could not be started or did not store everything."""
        self.reports: Reports
        """What workers ask for; it is made of them, and so after them."""
        self.workers = [
            WorkerProcess(
                number,
                listeners,
                self._setup,
                lambda: self._state,
                self._answers_to,
                self._forget,
                config.server,
            )
            for number, listeners in enumerate(bound)
        ]

    async def tell(self) -> None:
        """Tell the workers what changes, until cancelled."""
        while True:
            models = [*report_on(self._models)]
            if models != self._state["/models"]:
                self._state["/models"] = models
            for worker in self.workers:
                worker.tell()
            await asyncio.sleep(_TELL_EVERY_S)

    def use_config(self, config: Config) -> None:
        """Have the workers put a configuration into effect."""
        self._config = _of_worker(config, self._models, len(self.workers))
        self._state["/config"] = dump_config(self._config)

    def use_tenants(self, records: Mapping[str, TenantRecord]) -> None:
        """Have the workers use these tenants."""
        self._records = records
        self._state["/tenants"] = dump_records(records)

    def use_certificate(self) -> None:
        """Have the workers read the certificate."""
        self._state["/certificate"] = [0]

    def runs(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the tasks that keep the workers running."""
        return map(self._keep, self.workers)

    async def until_ready(self) -> None:
        """Wait until all workers answer clients, or the server stops."""
        waits = [
            asyncio.create_task(wait)
            for wait in (self._until_all_are_ready(), self._until_stopped())
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()

    async def _until_all_are_ready(self) -> None:
        for worker in self.workers:
            await worker.ready.wait()

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    async def drain(self) -> None:
        """Have all workers drain."""
        await asyncio.gather(*(worker.drain() for worker in self.workers))

    async def end(self, grace_s: float) -> None:
        """Let requests end within `grace_s`, then end all workers."""
        await asyncio.gather(*(worker.stop(grace_s) for worker in self.workers))

    async def _keep(self, worker: WorkerProcess) -> None:
        """Keep a worker running; if it can't be started, the server stops."""
        try:
            await worker.run()
        except WorkerError as exc:
            logger.critical("%s", exc)
            self.failed = True
            self._stop.set()

    def _setup(self, number: int, door: int, listeners: Sequence[int]) -> Setup:
        return Setup(
            number,
            self._config,
            self._records,
            self._state["/models"],
            self._started_at,
            door,
            self._counters.fd,
            listeners,
        )

    def _forget(self, worker: WorkerProcess) -> None:
        self._counters.forget(worker.number)
        self.reports.forget(worker)

    def _answers_to(self, worker: WorkerProcess) -> LinkHandler:
        answers: dict[tuple[str, str], Callable[[HttpRequest], Awaitable[bytes]]] = {
            ("POST", "/ready"): partial(self._note_ready, worker),
            ("GET", "/models"): self._report_on_models,
            ("POST", "/unreachable"): self._note_unreachable,
            ("GET", "/ran-since"): self._has_run_since,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/overview"): self._overview,
        }

        async def answer(http: HttpRequest) -> web.StreamResponse:
            found = answers[http.method, http.path]
            return web.Response(body=await found(http))

        return answer

    async def _note_ready(self, worker: WorkerProcess, _: HttpRequest) -> bytes:
        worker.note_ready()
        return orjson.dumps(self._draining.has_begun)

    async def _report_on_models(self, _: HttpRequest) -> bytes:
        return orjson.dumps([*report_on(self._models)])

    async def _note_unreachable(self, http: HttpRequest) -> bytes:
        told = orjson.loads(await http.read_body())
        for upstream in self._models.upstreams(told["model"]).all:
            if upstream.label == told["upstream"]:
                upstream.mark_unreachable(OSError(0, told["why"]))
        return b""

    async def _has_run_since(self, http: HttpRequest) -> bytes:
        model, since = http.query["model"], float(http.query["since"])
        (engine,) = self._models.upstreams(model).all
        has_run = await engine.keeps_generating(since=since, model=model, headers={})
        return orjson.dumps(has_run)

    async def _metrics(self, _: HttpRequest) -> bytes:
        return await self.reports.metrics()

    async def _overview(self, http: HttpRequest) -> bytes:
        tenant = http.query.get("tenant")
        if tenant is None:
            return orjson.dumps(await self.reports.for_operator())
        return orjson.dumps(await self.reports.for_tenant(tenant))


def _of_master(config: Config) -> Config:
    """Return the configuration of what the master opens."""
    tiers = config.tiers.model_copy(update={"memory": None})
    log = config.log.model_copy(update={"trace": None})
    return config.model_copy(update={"tiers": tiers, "log": log, "tracing": None})


def _of_worker(config: Config, models: Models, workers: int) -> Config:
    """Return the configuration of one of so many workers."""
    changed: dict[str, Any] = {"models": {model.name: model.config for model in models.all}}
    if (memory := config.tiers.memory) is not None:
        part = max(memory.max_bytes // workers, _MIN_MEMORY_BYTES)
        memory = memory.model_copy(update={"max_bytes": ByteSize(part)})
        changed["tiers"] = config.tiers.model_copy(update={"memory": memory})
    return config.model_copy(update=changed)
