"""One HTTP/1.1 connection: writes requests, has answers parsed, and tells exchanges of them.

It has at most one exchange at a time. Nothing is queued, and nothing waits: its client decides.
"""

import asyncio
from collections.abc import Callable
from math import isnan, nan
from typing import Protocol, cast

import httptools

from server.bench.records import Failure

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values."""
_HEAD_BYTES = 256 * 1024
_FRAMING = (b"content-length", b"transfer-encoding")


class Exchange:
    """A request and what the client tells of its answer; a subclass makes use of that.

    Attributes:
        path, body: what is asked.
        sent: when it was begun: a connection that it needs is made after that. first_byte: when
            the answer's first byte came. NaN until then.
    """

    __slots__ = ("body", "first_byte", "is_retry", "path", "sent")

    def __init__(self, path: str, body: bytes) -> None:
        self.path, self.body = path, body
        self.sent = self.first_byte = nan
        self.is_retry = False

    def on_head(self, status: int, headers: Headers) -> None:
        """Take the head of the answer."""
        raise NotImplementedError

    def on_body(self, data: bytes, now: float) -> None:
        """Take what a packet held of the body."""
        raise NotImplementedError

    def on_end(self, failure: Failure, now: float) -> None:
        """Take the end: the answer is whole by the rules of HTTP, or the exchange has failed."""
        raise NotImplementedError


class Origin(Protocol):
    """What a connection needs of its client."""

    clock: Callable[[], float]

    def head(self, exchange: Exchange) -> bytes:
        """Return the head of a request."""
        ...

    def rest(self, connection: "KeptConnection") -> None:
        """Keep a connection for the next exchange."""
        ...

    def forget(self, connection: "KeptConnection") -> None:
        """Drop a connection that has ended or is being closed; may be called twice."""
        ...

    def retry(self, exchange: Exchange) -> None:
        """Start an exchange over a new connection."""
        ...


class KeptConnection(asyncio.Protocol):
    """A connection, with one exchange at a time."""

    def __init__(self, origin: Origin) -> None:
        self._origin, self._clock = origin, origin.clock
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._is_used = False
        self.exchange: Exchange | None = None
        self.heard_at = nan
        """When a byte was last sent or received."""
        self.is_lost = False
        self._reset()

    def _reset(self) -> None:
        self._headers: Headers = []
        self._head_bytes = 0
        self._has_head = self._is_whole = False
        self._keeps_alive = self._has_excess = False

    def send(self, exchange: Exchange) -> None:
        """Begin an exchange; the connection must be at rest."""
        self.exchange = exchange
        now = self.heard_at = self._clock()
        if isnan(exchange.sent):
            exchange.sent = now
        self.transport.write(self._origin.head(exchange) + exchange.body)

    def end(self, failure: Failure) -> None:
        """End the exchange; after a failure, or where the server wants it, the connection too."""
        exchange, self.exchange = self.exchange, None
        keeps = (
            failure is Failure.NONE
            and not self._has_excess
            and not self.is_lost
            and self._keeps_alive
        )
        if keeps:
            self._is_used = True
            self._reset()
            self._origin.rest(self)
        else:
            self.drop()
        if exchange is not None:
            exchange.on_end(failure, self._clock())

    def drop(self) -> None:
        """Close the connection without waiting for anything."""
        self._origin.forget(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nothing was asked.
            self.drop()
            return
        now = self.heard_at = self._clock()
        if isnan(exchange.first_byte):
            exchange.first_byte = now
        had_head, is_http = self._has_head, True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # What follows a whole answer is no part of it.
            is_http, self._has_excess = self._is_whole, True
        if not had_head:
            if self._has_head:
                exchange.on_head(self._status, self._headers)
            else:
                self._head_bytes += len(data)
                is_http = is_http and self._head_bytes <= _HEAD_BYTES
        if pieces := self._pieces:
            exchange.on_body(pieces[0] if len(pieces) == 1 else b"".join(pieces), now)
            self._pieces = []
        if not is_http:
            self.end(Failure.PROTOCOL)
        elif self._is_whole:
            self.end(Failure.NONE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._origin.forget(self)
        exchange = self.exchange
        if exchange is None:
            return
        is_framed = any(name in _FRAMING for name, _ in self._headers)
        if self._has_head and not is_framed and exc is None:
            # The end of the connection is the end of such a body (RFC 9112, section 6.3).
            self.end(Failure.NONE)
        elif self._is_used and isnan(exchange.first_byte) and not exchange.is_retry:
            # The server had closed the connection before our request came (section 9.3.1).
            self.exchange, exchange.is_retry = None, True
            self._origin.retry(exchange)
        else:
            self.end(Failure.DISCONNECTED)

    # The parser calls these.

    def on_message_begin(self) -> None:
        """Note what follows a whole answer."""
        self._has_excess = self._is_whole

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header, of a trailer too, which nobody reads."""
        if not self._has_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Note the end of a head, unless it is an interim one."""
        status = self._parser.get_status_code()
        if self._is_whole:
            return
        if status < 200:
            self._headers = []
            return
        self._has_head, self._status = True, status

    def on_body(self, data: bytes) -> None:
        """Note a piece of the body; a packet may hold thousands."""
        if not self._is_whole:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end of the answer; an interim head is none."""
        self._is_whole = self._has_head
        self._keeps_alive = self._parser.should_keep_alive()
