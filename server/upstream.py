"""Upstreams: the engines' HTTP servers, whether each answers, and whose turn it is."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

logger = logging.getLogger(__name__)

_CONNECT_S = 5
_PROBE_DOWN_S = 0.5
_PROBE_UP_S = 2.0
# More than any engine runs at once; the rest waits for a connection, not for memory.
_CONNECTIONS = 1024


class UnavailableError(Exception):
    """No upstream answers at present."""


class Upstream:
    """One engine's HTTP server, by TCP or over a Unix socket.

    Args:
        url: its base address.
        socket: the path of its Unix socket, if it listens on one.
        timeout_s: seconds that it may stay silent within an answer.
    """

    def __init__(self, url: str, *, timeout_s: float, socket: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.ready = False
        connector: aiohttp.BaseConnector = (
            aiohttp.TCPConnector(limit=_CONNECTIONS)
            if socket is None
            else aiohttp.UnixConnector(socket, limit=_CONNECTIONS)
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=timeout_s),
            auto_decompress=False,
        )

    async def watch(self) -> None:
        """Keep `ready` true to whether the upstream answers, until cancelled."""
        while True:
            before, self.ready = self.ready, await self._answers()
            if self.ready != before:
                logger.info("upstream %s", "ready" if self.ready else "not ready")
            await asyncio.sleep(_PROBE_UP_S if self.ready else _PROBE_DOWN_S)

    async def _answers(self) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=_CONNECT_S)
            async with self.session.get(f"{self.url}/v1/models", timeout=timeout) as response:
                # One that wants a key answers too.
                return response.status in (200, 401, 403)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False


class Upstreams:
    """All upstreams, asked in turn."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.all = tuple(upstreams)
        self._turn = itertools.count()

    @property
    def ready(self) -> bool:
        """Whether any upstream answers."""
        return any(upstream.ready for upstream in self.all)

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, data: Any, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the next upstream that takes the connection; gives the reply as it begins.

        Raises:
            UnavailableError: none answers.
            aiohttp.ClientError: the one that was asked failed.
        """
        while True:
            upstream = self._pick()
            try:
                reply = await upstream.session.request(
                    method,
                    upstream.url + path,
                    data=data,
                    headers=headers,
                    allow_redirects=False,
                )
                break
            except aiohttp.ClientConnectorError:
                # Nothing was sent yet; the next one is asked, and this one once it is back.
                upstream.ready = False
        async with reply:
            yield reply

    def _pick(self) -> Upstream:
        ready = [upstream for upstream in self.all if upstream.ready]
        if not ready:
            raise UnavailableError
        return ready[next(self._turn) % len(ready)]

    async def close(self) -> None:
        """Close all connections."""
        for upstream in self.all:
            await upstream.session.close()
