"""A lean HTTP/1.1 client: POST requests over kept connections, answers by callbacks.

It has no task, future or timer for each request, so that one core offers many. It queues nothing:
who starts an exchange asks before whether there is room. Each exchange has one end, which comes
after `HttpClient.start` has returned, or by `close`.
"""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import cast
from urllib.parse import SplitResult, urlsplit

from server.bench.clients.http_connection import Exchange, KeptConnection
from server.bench.load import Target
from server.bench.records import Failure
from server.config.base import VERSION, ConfigError

Connect = Callable[[Callable[[], KeptConnection]], Awaitable[KeptConnection]]
"""Makes a connection, with the protocol that the argument makes; raises OSError."""


class HttpClient:
    """Exchanges with one server, over at most so many connections.

    Args:
        target: the server, and headers for each request.
        connections: at most so many at a time.
        timeout_s: how long a server may be silent; it is noticed up to a tenth later.
        clock: seconds.
        connect: makes connections; None makes those to the target.

    Raises:
        ConfigError: the URL or a header can't be sent.
    """

    def __init__(
        self,
        target: Target,
        connections: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        connect: Connect | None = None,
    ) -> None:
        self.clock = clock
        self._limit, self._timeout_s = connections, timeout_s
        self._loop = asyncio.get_running_loop()
        self._connect = connect or Address(target.url).connect
        self._prefix, self._fields = _head_parts(target)
        self._heads: dict[str, bytes] = {}
        self._resting: dict[KeptConnection, None] = {}
        self._connections: set[KeptConnection] = set()
        self._opening: dict[asyncio.Task[None], Exchange] = {}
        self._timer = self._loop.call_later(timeout_s / 10, self._sweep)

    @property
    def has_room(self) -> bool:
        """Whether an exchange can be started."""
        return bool(self._resting) or len(self._connections) + len(self._opening) < self._limit

    def start(self, exchange: Exchange) -> None:
        """Send a request; there must be room."""
        if self._resting:
            self._resting.popitem()[0].send(exchange)
        else:
            exchange.sent = self.clock()
            self.retry(exchange)

    def retry(self, exchange: Exchange) -> None:
        task = self._loop.create_task(self._open(exchange))
        self._opening[task] = exchange

    def close(self) -> None:
        """End all exchanges as interrupted, and all connections."""
        self._timer.cancel()
        opening, self._opening = self._opening, {}
        for task, exchange in opening.items():
            task.cancel()
            exchange.on_end(Failure.INTERRUPTED, self.clock())
        for connection in list(self._connections):
            connection.end(Failure.INTERRUPTED)

    async def _open(self, exchange: Exchange) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect(lambda: KeptConnection(self))
        except (OSError, ValueError):
            # A name that can't be encoded is a ValueError.
            if self._opening.pop(task, None) is not None:
                exchange.on_end(Failure.CONNECT, self.clock())
            return
        if self._opening.pop(task, None) is None:
            connection.transport.abort()
        elif connection.is_lost:
            exchange.on_end(Failure.CONNECT, self.clock())
        else:
            self._connections.add(connection)
            connection.send(exchange)

    def _sweep(self) -> None:
        """End what has been silent for too long; one timer serves all."""
        before = self.clock() - self._timeout_s
        for connection in list(self._connections):
            if connection.exchange is not None and connection.heard_at <= before:
                connection.end(Failure.TIMEOUT)
        self._timer = self._loop.call_later(self._timeout_s / 10, self._sweep)

    def head(self, exchange: Exchange) -> bytes:
        if (head := self._heads.get(exchange.path)) is None:
            head = f"POST {self._prefix}{exchange.path} HTTP/1.1\r\n{self._fields}".encode()
            self._heads[exchange.path] = head
        return b"%b%d\r\n\r\n" % (head, len(exchange.body))

    def rest(self, connection: KeptConnection) -> None:
        self._resting[connection] = None

    def forget(self, connection: KeptConnection) -> None:
        self._connections.discard(connection)
        self._resting.pop(connection, None)


class Address:
    """Where a URL leads. The address that answered first is asked again, not the name."""

    def __init__(self, url: str) -> None:
        parts = _split(url)
        self._name = parts.hostname or ""
        self._host, self._port = self._name, parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None

    async def connect(self, make: Callable[[], KeptConnection]) -> KeptConnection:
        """Make a connection.

        Raises:
            OSError: none can be made.
        """
        loop = asyncio.get_running_loop()
        try:
            transport, connection = await loop.create_connection(
                make,
                self._host,
                self._port,
                ssl=self._ssl,
                server_hostname=self._name if self._ssl else None,
            )
        except OSError:
            self._host = self._name
            raise
        self._host = transport.get_extra_info("peername")[0]
        return connection


def check_target(target: Target) -> None:
    """Check that requests can be made for a target.

    Raises:
        ConfigError: its URL or a header can't be sent.
    """
    _head_parts(target)


def _head_parts(target: Target) -> tuple[str, str]:
    """Return the path before each route, and the lines of a head up to the body's length."""
    parts = _split(target.url)
    given = {name.lower(): (name, value) for name, value in target.headers}
    own = (
        ("Host", parts.netloc.rpartition("@")[2]),
        ("User-Agent", f"tierserve-bench/{VERSION}"),
        ("Content-Type", "application/json"),
    )
    fields = [field for field in own if field[0].lower() not in given] + list(given.values())
    lines = [f"{name}: {value}" for name, value in fields]
    for line in lines:
        if not line.isascii() or not line.isprintable() or line.startswith(":"):
            raise ConfigError([f"--header: should be printable ASCII, NAME: VALUE, not {line!r}"])
    return parts.path.rstrip("/"), "".join(f"{line}\r\n" for line in (*lines, "Content-Length: "))[
        :-2
    ]


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_right = is_right and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        is_right = False
    if not is_right or parts.query or parts.fragment:
        raise ConfigError([f"URL: should be http://HOST:PORT or https://HOST, not {url!r}"])
    return parts
