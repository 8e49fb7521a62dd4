"""The OpenAPI document as it is served: made anew whenever an engine has become ready."""

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.engine.models import Models
from server.engine.upstream import UnavailableError, Upstreams
from server.pages.resource import ETagResource
from server.web.request import HttpRequest

logger = logging.getLogger(__name__)

_ENGINE_S = 10
# vLLM's has 300 kB.
_MAX_BYTES = 8 * 1024**2


class OpenApiHandler:
    """The document of one server.

    Args:
        models: the engines of all that are ready are asked for theirs.
        make: returns ours, given theirs; `None` stands for that of one that tells none.
    """

    def __init__(
        self,
        models: Models,
        make: Callable[[Sequence[Mapping[str, Any] | None]], dict[str, Any]],
    ) -> None:
        self._models, self._make = models, make
        self._without_engine = self._as_resource([])
        self._made: tuple[Hashable, ETagResource] = (None, self._without_engine)
        self._making: asyncio.Task[ETagResource] | None = None

    async def answer(self, http: HttpRequest) -> web.Response:
        """Answer with the document as it is now."""
        return (await self._current()).response(http)

    async def _current(self) -> ETagResource:
        ready = [model.upstreams for model in self._models.all if model.upstreams.ready]
        if not ready:
            return self._without_engine
        since = tuple(each.ready_since for upstreams in ready for each in upstreams.all)
        if since == self._made[0]:
            return self._made[1]
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._made_anew(ready, since))
        # It is for all who wait, and outlives those who leave.
        return await asyncio.shield(self._making)

    async def _made_anew(self, ready: Sequence[Upstreams], since: Hashable) -> ETagResource:
        try:
            told = [await _asked(upstreams) for upstreams in ready]
            # It takes some milliseconds.
            made = await asyncio.to_thread(self._merged, told)
        except (UnavailableError, aiohttp.ClientError, OSError, ValueError) as exc:
            logger.warning("the engine's OpenAPI document can't be had: %s", exc)
            return self._without_engine
        self._made = since, made
        return made

    def _merged(self, told: Sequence[bytes | None]) -> ETagResource:
        engines = [None if raw is None else orjson.loads(raw) for raw in told]
        if not all(isinstance(engine, dict | None) for engine in engines):
            raise ValueError("it is no object")
        return self._as_resource(engines)

    def _as_resource(self, engines: Sequence[Mapping[str, Any] | None]) -> ETagResource:
        return ETagResource(orjson.dumps(self._make(engines)), "application/json")


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
