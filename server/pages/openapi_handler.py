"""Serves `/openapi.json`: the document is built again whenever an engine becomes ready."""

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.engine.models import ServedModels
from server.engine.routing.upstreams import Upstreams
from server.engine.upstream import UnavailableError
from server.pages.resource import ETagResource
from server.web.request import HttpRequest

logger = logging.getLogger(__name__)

_ENGINE_TIMEOUT_S = 10
# vLLM's document has 300 kB.
_MAX_BYTES = 8 * 1024**2


class OpenApiHandler:
    """The handler of `/openapi.json`.

    Args:
        models: whose engines' documents are merged.
        build: builds our document from those of the engines that are ready; `None` stands for an
            engine without a document.
    """

    def __init__(
        self,
        models: ServedModels,
        build: Callable[[Sequence[Mapping[str, Any] | None]], dict[str, Any]],
    ) -> None:
        self._models, self._build = models, build
        self._without_engine = self._as_resource([])
        self._built: tuple[Hashable, ETagResource] = (None, self._without_engine)
        self._building: asyncio.Task[ETagResource] | None = None

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer a request for the document."""
        return (await self._current()).response(http)

    async def _current(self) -> ETagResource:
        ready = [model.upstreams for model in self._models.all if model.upstreams.ready]
        if not ready:
            return self._without_engine
        since = tuple(each.ready_since for upstreams in ready for each in upstreams.all)
        if since == self._built[0]:
            return self._built[1]
        if self._building is None or self._building.done():
            self._building = asyncio.create_task(self._rebuild(ready, since))
        # All requests share the task, so it goes on when one of them is cancelled.
        return await asyncio.shield(self._building)

    async def _rebuild(self, ready: Sequence[Upstreams], since: Hashable) -> ETagResource:
        try:
            bodies = [await _fetch(upstreams) for upstreams in ready]
            # Merging takes some milliseconds.
            document = await asyncio.to_thread(self._merge, bodies)
        except (UnavailableError, aiohttp.ClientError, OSError, ValueError) as exc:
            logger.warning("the engine's OpenAPI document can't be used: %s", exc)
            return self._without_engine
        self._built = since, document
        return document

    def _merge(self, bodies: Sequence[bytes | None]) -> ETagResource:
        engines = [None if body is None else orjson.loads(body) for body in bodies]
        if not all(isinstance(engine, dict | None) for engine in engines):
            raise ValueError("it is not a JSON object")
        return self._as_resource(engines)

    def _as_resource(self, engines: Sequence[Mapping[str, Any] | None]) -> ETagResource:
        return ETagResource(orjson.dumps(self._build(engines)), "application/json")


async def _fetch(upstreams: Upstreams) -> bytes | None:
    """Return the engine's document, or `None` if it has none.

    Raises:
        ValueError: it is too large.
        UnavailableError, aiohttp.ClientError, OSError: the engine failed.
    """
    headers = {"Accept-Encoding": "identity"}
    async with (
        asyncio.timeout(_ENGINE_TIMEOUT_S),
        upstreams.request("GET", "/openapi.json", data=None, headers=headers) as reply,
    ):
        if reply.status != 200:
            return None
        body = bytearray()
        async for chunk in reply.content.iter_any():
            body += chunk
            if len(body) > _MAX_BYTES:
                raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        return bytes(body)
