"""What a worker answers the master, over their link: what it has, and what it is told to do."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from server.admin.local import LocalOperations
from server.app import Server, build_admin_handler
from server.audit.acts import Audit
from server.auth.tenants import Tenants
from server.cache import TierStack
from server.config.base import ConfigError
from server.config.schema import Config
from server.engine.followed import FollowedModels, ModelReport
from server.web.request import HttpRequest
from server.web.tls import Certificate
from server.workers.merged_metrics import snapshot
from server.workers.setup import load_config, load_records

logger = logging.getLogger(__name__)


class Orders:
    """The worker's side of the link.

    Whatever isn't answered here is the admin API's, on the tiers of this worker.

    Args:
        config: the worker's.
        server: what answers its clients.
        models: follow the master's.
        tenants: follow the master's.
        certificate: is read when the master says so, if there is one.
        stack: its tiers.
        stop: is set when it is to end.
    """

    def __init__(
        self,
        config: Config,
        server: Server,
        models: FollowedModels,
        tenants: Tenants,
        certificate: Certificate | None,
        stack: TierStack,
        stop: asyncio.Event,
    ) -> None:
        self._server, self._models, self._tenants = server, models, tenants
        self._certificate, self._stack, self._stop = certificate, stack, stop
        # The master has the other tiers open, too, and lists them once for all workers.
        memory = [tier for tier in stack.chain.tiers if tier.in_memory]
        # Nor does a worker record what it is told: the master has recorded what it was asked.
        self._admin = build_admin_handler(
            lambda: config, LocalOperations(stack.chain, memory), Audit(None), {}
        )
        self._all_tiers = LocalOperations(stack.chain)
        self._answers: dict[tuple[str, str], Callable[[HttpRequest], Awaitable[Any]]] = {
            ("GET", "/snapshot"): self._snapshot,
            ("GET", "/stats"): lambda _: self._all_tiers.stats(),
            ("GET", "/history"): self._history,
            ("GET", "/prefixes"): self._prefixes,
            ("POST", "/holds"): self._holds,
            ("POST", "/models"): self._follow_models,
            ("POST", "/config"): self._follow_config,
            ("POST", "/tenants"): self._follow_tenants,
            ("POST", "/certificate"): self._read_certificate,
            ("POST", "/drain"): self._drain,
            ("POST", "/stop"): self._end,
        }

    async def answer(self, http: HttpRequest) -> web.StreamResponse:
        """Answer the master."""
        found = self._answers.get((http.method, http.path))
        if found is None:
            return await self._admin.answer(http)
        return web.Response(body=orjson.dumps(await found(http)), content_type="application/json")

    async def _snapshot(self, _: HttpRequest) -> Any:
        overview = self._server.overview.for_operator()
        return {
            "metrics": snapshot(self._server.metrics.registry),
            "tiers": overview["tiers"],
            "history": overview["history"],
        }

    async def _history(self, http: HttpRequest) -> Any:
        return self._server.overview.for_tenant(http.query["tenant"])["history"]

    async def _prefixes(self, _: HttpRequest) -> Any:
        return self._server.prefixes.summary()

    async def _holds(self, http: HttpRequest) -> Any:
        """Return which of the keys its memory tier holds."""
        keys = orjson.loads(await http.read_body())
        memory = [tier.local for tier in self._stack.chain.tiers if tier.in_memory]
        return [any(each is not None and each.holds(key) for each in memory) for key in keys]

    async def _follow_models(self, http: HttpRequest) -> Any:
        reports = orjson.loads(await http.read_body())
        self._models.follow([ModelReport.of_json(each) for each in reports])

    async def _follow_config(self, http: HttpRequest) -> Any:
        self._server.use(load_config(orjson.loads(await http.read_body())))

    async def _follow_tenants(self, http: HttpRequest) -> Any:
        self._tenants.use(load_records(await http.read_body()))

    async def _read_certificate(self, _: HttpRequest) -> Any:
        if (certificate := self._certificate) is not None:
            try:
                certificate.use(await asyncio.to_thread(certificate.read))
            except ConfigError as exc:
                logger.error("the certificate stays as it was: %s", exc)

    async def _drain(self, _: HttpRequest) -> Any:
        self._server.draining.begin()

    async def _end(self, _: HttpRequest) -> Any:
        self._stop.set()
