"""The OpenAPI document as it is served: made anew whenever an engine has become ready."""

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.http_request import HttpRequest
from server.models import Models
from server.pages.resource import Resource
from server.upstream import UnavailableError, Upstreams

logger = logging.getLogger(__name__)

_ENGINE_S = 10
# vLLM's has 300 kB.
_MAX_BYTES = 8 * 1024**2


class Document:
    """The document of one server.

    Args:
        models: the engine of the first that is ready is asked for its own.
        make: returns ours, given the engine's, or `None` where there is none.
    """

    def __init__(
        self, models: Models, make: Callable[[Mapping[str, Any] | None], dict[str, Any]]
    ) -> None:
        self._models, self._make = models, make
        self._without_engine = self._as_resource(None)
        self._made: tuple[Hashable, Resource] = (None, self._without_engine)
        self._making: asyncio.Task[Resource] | None = None

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer with the document as it is now."""
        return (await self._current()).response(http)

    async def _current(self) -> Resource:
        upstreams = next((m.upstreams for m in self._models.all if m.upstreams.ready), None)
        if upstreams is None:
            return self._without_engine
        since = tuple(upstream.ready_since for upstream in upstreams.all)
        if since == self._made[0]:
            return self._made[1]
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._made_anew(upstreams, since))
        # It is for all who wait, and outlives those who leave.
        return await asyncio.shield(self._making)

    async def _made_anew(self, upstreams: Upstreams, since: Hashable) -> Resource:
        try:
            raw = await _asked(upstreams)
            # It takes some milliseconds.
            made = await asyncio.to_thread(self._merged, raw)
        except (UnavailableError, aiohttp.ClientError, OSError, ValueError) as exc:
            logger.warning("the engine's OpenAPI document can't be had: %s", exc)
            return self._without_engine
        self._made = since, made
        return made

    def _merged(self, raw: bytes | None) -> Resource:
        engine = None if raw is None else orjson.loads(raw)
        if engine is not None and not isinstance(engine, dict):
            raise ValueError("it is no object")
        return self._as_resource(engine)

    def _as_resource(self, engine: Mapping[str, Any] | None) -> Resource:
        return Resource(orjson.dumps(self._make(engine)), "application/json")


async def _asked(upstreams: Upstreams) -> bytes | None:
    """Return the engine's document; `None` where it doesn't tell one.

    Raises:
        ValueError: it is too large.
        UnavailableError, aiohttp.ClientError, OSError: the engine failed.
    """
    headers = {"Accept-Encoding": "identity"}
    async with (
        asyncio.timeout(_ENGINE_S),
        upstreams.request("GET", "/openapi.json", data=None, headers=headers) as reply,
    ):
        if reply.status != 200:
            return None
        raw = bytearray()
        async for piece in reply.content.iter_any():
            raw += piece
            if len(raw) > _MAX_BYTES:
                raise ValueError("it is too large")
        return bytes(raw)
