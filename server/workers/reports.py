"""What all processes report together: metrics, the overview, the prefixes of prompts.

The master asks every worker and waits for each a bounded time; of one that doesn't answer the last
report counts. It also asks now and then by itself, so that a worker that dies takes little with it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from server.workers.child import WorkerProcess
from server.workers.link import LinkError
from server.workers.merged_metrics import MergedMetrics, snapshot
from server.workers.merged_overview import MergedHistories, MergedPrefixes, merge_tiers

logger = logging.getLogger(__name__)

_EVERY_S = 5.0
# Twice that is less than a worker waits for us.
_WITHIN_S = 2.0
# The lowest number, since it is the master that runs the engines.
_MASTER = -1
_ALL_TENANTS = ""


_Take = Callable[[int, Any], None]
"""Takes a worker's number and what it has answered."""


class Reports(Collector):
    """The reports of the master and all workers. It collects the merged metrics.

    Args:
        workers: all of them.
        registry: has the master's own metrics.
        own: returns the master's overview, whose engines and prefix tier hold for all.
    """

    def __init__(
        self,
        workers: Sequence[WorkerProcess],
        registry: CollectorRegistry,
        own: Callable[[], dict[str, Any]],
    ) -> None:
        self._workers, self._registry, self._own = workers, registry, own
        self._metrics, self._histories = MergedMetrics(), MergedHistories()
        self._prefixes = MergedPrefixes()
        self._tiers: dict[int, list[dict[str, Any]]] = {}

    async def run(self) -> None:
        """Ask all workers now and then, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self._refresh()
            await self._ask("/prefixes", self._prefixes.add_worker)

    def forget(self, worker: WorkerProcess) -> None:
        """Note that a process of the worker has died: what it has counted stays."""
        for merged in (self._metrics, self._histories, self._prefixes):
            merged.forget(worker.number)
        self._tiers.pop(worker.number, None)

    async def metrics(self) -> bytes:
        """Return the metrics of all processes, as Prometheus reads them."""
        await self._refresh()
        self._metrics.add_worker(_MASTER, snapshot(self._registry))
        return generate_latest(self)

    def collect(self) -> Any:
        return self._metrics.families()

    async def for_operator(self) -> dict[str, Any]:
        """Return the overview of all tenants."""
        await self._refresh()
        own = self._own()
        tiers = merge_tiers([*self._tiers.values(), own["tiers"]])
        history = self._histories.report(_ALL_TENANTS, time.time())
        names = [tier["tier"] for tier in tiers]
        return own | {"tier_names": names, "tiers": tiers, "history": history}

    async def for_tenant(self, name: str) -> dict[str, Any]:
        """Return the overview of one tenant."""
        query = urlencode({"tenant": name})
        await self._ask(
            f"/history?{query}",
            lambda worker, answer: self._histories.add_worker(worker, {name: answer}),
        )
        whole = await self.for_operator()
        history = self._histories.report(name, time.time())
        shown = {field: whole[field] for field in ("version", "models", "tier_names")}
        return shown | {"history": history, "tenant": name}

    async def prefixes(self) -> dict[str, Any]:
        """Return the most frequent prefixes of all prompts."""
        await self._ask("/prefixes", self._prefixes.add_worker)
        merged: dict[str, Any] = self._prefixes.report()
        return merged

    async def _refresh(self) -> None:
        await self._ask("/snapshot", self._take_snapshot)

    def _take_snapshot(self, worker: int, answer: Any) -> None:
        self._metrics.add_worker(worker, answer["metrics"])
        self._histories.add_worker(worker, {_ALL_TENANTS: answer["history"]})
        self._tiers[worker] = answer["tiers"]

    async def _ask(self, path: str, take: _Take) -> None:
        """Ask all workers at once, and give `take` what each one says."""
        await asyncio.gather(*(self._ask_one(worker, path, take) for worker in self._workers))

    async def _ask_one(self, worker: WorkerProcess, path: str, take: _Take) -> None:
        link = worker.link
        if link is None or not worker.ready.is_set():
            return
        try:
            answer = orjson.loads(await link.call("GET", path, within_s=_WITHIN_S))
        except LinkError as exc:
            logger.warning("worker %d: %s", worker.number, exc)
            return
        # What a dead process said last must not count as its successor's.
        if worker.link is link:
            take(worker.number, answer)
