"""A plain TCP balancer, as HAProxy in its mode `tcp`: passes bytes on to servers that are ready."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import aiohttp

from tests.servers import free_port
from tests.waiting import HANGS_S

_CHECK_EVERY_S = 0.05
_PIECE_BYTES = 64 * 1024


class Balancer:
    """Gives each new connection to the next server that is ready by its last health check.

    Where that takes no connection the next one gets it, as nothing has been sent yet (HAProxy's
    `option redispatch`). What has been given to a server stays there: nothing is sent twice.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.port = free_port()
        self._ports, self._turn = [*ports], 0
        self._joins: set[asyncio.Task[None]] = set()
        self._given: Counter[int] = Counter()
        self.ready: set[int] = set()
        self.lost = 0
        """How many connections found no server."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        self._checks = [asyncio.create_task(self._check(port)) for port in self._ports]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [*self._checks, *self._joins]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def until_ready(self, *ports: int) -> None:
        """Wait until exactly these servers are ready."""
        async with asyncio.timeout(HANGS_S):
            while self.ready != {*ports}:  # noqa: ASYNC110
                await asyncio.sleep(_CHECK_EVERY_S)

    async def until_left(self, port: int, *, but: int) -> None:
        """Wait until a server has no connections, but perhaps so many."""
        async with asyncio.timeout(HANGS_S):
            while self._given[port] > but:  # noqa: ASYNC110
                await asyncio.sleep(_CHECK_EVERY_S)

    async def _check(self, port: int) -> None:
        while True:
            status = 0
            with suppress(aiohttp.ClientError):
                async with self._session.get(f"http://127.0.0.1:{port}/ready") as reply:
                    status = reply.status
            (self.ready.add if status == 200 else self.ready.discard)(port)
            await asyncio.sleep(_CHECK_EVERY_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The event loop alone would forget it.
        task = asyncio.create_task(self._join(reader, writer))
        self._joins.add(task)
        task.add_done_callback(self._joins.discard)
        # Also if it was cancelled before it began.
        task.add_done_callback(lambda _: writer.close())

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._turn += 1
        ready = sorted(self.ready)
        for at in range(len(ready)):
            port = ready[(self._turn + at) % len(ready)]
            with suppress(ConnectionError):
                server = await asyncio.open_connection("127.0.0.1", port)
                break
        else:
            self.lost += 1
            return
        self._given[port] += 1
        asking = asyncio.create_task(_pass_on(reader, server[1]))
        try:
            # Until the server ends; the client may end before, and wait for its answer.
            await _pass_on(server[0], writer)
        finally:
            self._given[port] -= 1
            asking.cancel()
            server[1].close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on to the end, and the end too."""
    with suppress(ConnectionError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    with suppress(OSError):
        writer.write_eof()
