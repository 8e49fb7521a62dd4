"""The link between the master and a worker: HTTP in both directions, without any address.

A connection is a pair of sockets, one end of which its maker passes through the *door*, a pair of
sockets that the worker inherits (unix(7), SCM_RIGHTS). So nobody else can connect, and nothing is
left behind in a folder. Each side asks the other by `call`, and waits a bounded time.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.config.schema import ServerConfig
from server.web.listener import accept, make_server
from server.web.request import HttpRequest

logger = logging.getLogger(__name__)

CALL_S = 5.0
"""How long a call may take."""
# What the two tell each other has no size that clients choose, but for an import or an export.
_MAX_BODY_BYTES = 256 * 1024**2
_SHUTDOWN_S = 1
_READ_S = 60.0

LinkHandler = Callable[[HttpRequest], Awaitable[web.StreamResponse]]


class LinkError(OSError):
    """The other side has gone, or doesn't answer in time, or refuses."""


class Link:
    """One side of the link.

    Args:
        door: its side of the door.
        options: of servers.
    """

    def __init__(self, door: socket.socket, options: ServerConfig) -> None:
        door.setblocking(False)
        self._door = door
        self._options = options.model_copy(update={"max_body_bytes": _MAX_BODY_BYTES})
        self._server: web.Server | None = None
        self._runner: web.ServerRunner | None = None
        # Calls have deadlines of their own; an export may take longer.
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_READ_S)
        self.session = aiohttp.ClientSession(
            "http://link", connector=_DoorConnector(door), timeout=timeout
        )
        """Its connections lead to the other side."""
        self._accepting: set[asyncio.Task[None]] = set()

    async def start(self, handler: LinkHandler) -> None:
        """Let `handler` answer the other side from now on."""
        self._server = make_server(handler, self._options)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=_SHUTDOWN_S)
        await self._runner.setup()
        asyncio.get_running_loop().add_reader(self._door, self._accept)

    async def call(
        self,
        method: str,
        path: str,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        within_s: float = CALL_S,
    ) -> bytes:
        """Return the body of the other side's answer.

        Raises:
            LinkError: there is none in time.
        """
        body = None if json is None else orjson.dumps(json, default=str)
        try:
            async with (
                asyncio.timeout(within_s),
                self.session.request(method, path, data=body, params=params) as reply,
            ):
                answer = await reply.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            raise LinkError(f"{method} {path} has no answer: {type(exc).__name__}") from exc
        if reply.status >= 400:
            raise LinkError(f"{method} {path} has status {reply.status}")
        return answer

    async def close(self) -> None:
        """Close all connections, and the door."""
        asyncio.get_running_loop().remove_reader(self._door)
        await self.session.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._door.close()

    def _accept(self) -> None:
        server = self._server
        while server is not None:
            try:
                passed, files, _, _ = socket.recv_fds(self._door, 1, 1)
            except BlockingIOError:
                return
            except OSError:
                passed = b""
            if not passed:
                # The other side has gone; who has started it, or was started by it, sees that.
                asyncio.get_running_loop().remove_reader(self._door)
                return
            for file in files:
                connection = socket.socket(fileno=file)
                # No engine that we start may hold it.
                connection.set_inheritable(False)
                task = asyncio.create_task(accept(server, connection, self._options))
                self._accepting.add(task)
                task.add_done_callback(self._accepting.discard)


class _DoorConnector(aiohttp.BaseConnector):
    """Makes connections to the other side of a door.

    aiohttp's connectors for Unix sockets and pipes differ in this method alone.
    """

    def __init__(self, door: socket.socket) -> None:
        super().__init__()
        self._door = door

    async def _create_connection(self, *_: Any, **__: Any) -> Any:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._door, [b"+"], [theirs.fileno()])
            except OSError as exc:
                ours.close()
                raise aiohttp.ClientConnectionError(f"the door is closed: {exc}") from exc
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(self._factory, sock=ours))[1]


def door() -> tuple[socket.socket, socket.socket]:
    """Return the two sides of a new door."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
