"""The overview: the engines' states, and which tiers answered in the last 24 hours.

Operators see the numbers of all tenants and the tiers' sizes, tenants see their own numbers.
"""

import time
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from server.engine.models import ServedModels
from server.prefix_tier.tier import PrefixNumbers, PrefixTier
from server.telemetry.finished import FinishedRequests
from server.telemetry.history import History
from server.web.request import HttpRequest
from tiers import Chain, Tier


class Overview:
    """The overview of one server.

    Args:
        chain: whose tiers are shown.
        finished: has the histories of each tenant and of all together.
        models: whose engines are shown.
        version: of tierserve.
        prefix_tier: is shown, too, if there is one.
    """

    def __init__(
        self,
        *,
        chain: Chain,
        finished: FinishedRequests,
        models: ServedModels,
        version: str,
        prefix_tier: PrefixTier | None = None,
    ) -> None:
        self._chain, self._finished = chain, finished
        self._models, self._version, self._prefix_tier = models, version, prefix_tier

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer a request with what its tenant may see."""
        tenant = http.tenant
        overview = self.for_operator() if tenant.operator else self.for_tenant(tenant.name)
        headers = {"Cache-Control": "no-store"}
        return web.Response(
            body=orjson.dumps(overview), content_type="application/json", headers=headers
        )

    def for_operator(self) -> dict[str, Any]:
        """Return the overview of all tenants."""
        tiers = [self._tier(each) for each in self._chain.tiers]
        shown: dict[str, Any] = {"tiers": tiers}
        if self._prefix_tier is not None:
            shown["prefix"] = _prefix(self._prefix_tier.report)
        return self._of(self._finished.history) | shown

    def for_tenant(self, name: str) -> dict[str, Any]:
        """Return the overview of one tenant that has a key of ours."""
        return self._of(self._finished.history_of(name)) | {"tenant": name}

    def _of(self, history: History) -> dict[str, Any]:
        return {
            "version": self._version,
            "models": [
                {"name": model.name, "state": model.state, "restarts": model.restarts}
                for model in self._models.all
            ],
            # Nearest first, including tiers that have not answered anything.
            "tier_names": [tier.name for tier in self._chain.tiers],
            "history": history.report(time.time()),
        }

    def _tier(self, tier: Tier) -> Mapping[str, Any]:
        shown = {"tier": tier.name, "available": self._chain.is_available(tier)}
        if (backend := tier.local) is not None:
            shown |= {"entries": backend.usage.entries, "bytes": backend.usage.bytes}
        return shown


def _prefix(report: PrefixNumbers) -> dict[str, Any]:
    return {
        "available": report.available,
        "blocks": report.blocks,
        "bytes": report.block_bytes,
        "max_bytes": report.max_bytes,
        "queried_tokens": report.total("queried_tokens"),
        "loaded_tokens": report.total("loaded_tokens"),
        "saved_seconds": report.total("saved_seconds"),
    }
