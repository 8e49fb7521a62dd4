"""A client's connection: aiohttp's HTTP/1.1 protocol, its timeouts, and the short way in."""

import asyncio
import logging
from functools import lru_cache
from typing import Any, NamedTuple

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import BadHttpMethod, BadStatusLine, InvalidURLError, LineTooLong

from server.config.base import SERVER
from server.web.known_requests import KnownRequest, KnownRequests
from server.web.request import CONTINUE, HttpRequest
from server.web.responses import error_response

logger = logging.getLogger(__name__)

_INVALID = "The request is not valid HTTP"
_MISTAKES = {
    LineTooLong: (431, "The request's target or a header is longer than 8190 bytes."),
    InvalidURLError: (400, f"{_INVALID}: its target is no URL."),
    BadHttpMethod: (400, f"{_INVALID}: its method is invalid, or it is TLS on a port without."),
    BadStatusLine: (400, f"{_INVALID}: its first line should end with HTTP/1.1 or HTTP/1.0."),
}
"""Statuses and texts by aiohttp's exceptions, subclasses first; its texts quote the request."""
# Longer than clients and proxies keep idle connections, so that they close them and we don't.
_KEEP_ALIVE_S = 630
# Between two checks whether a half-closed client is still there.
_PRESENCE_CHECK_S = 0.5
# For the rest of a request whose head is known: clients send head and body one after the other.
_REST_S = 0.05
# An idle connection keeps so short a body, here and in aiohttp's payload, from which it isn't read.
_SHORT_BYTES = 8 * 1024
# Where the parser stands isn't known any more.
_LOST = -1
# `NamedTuple`'s own way to make a tuple would be a call more for each request.
_new = tuple.__new__
_NOT_KNOWN = (hdrs.CONTENT_ENCODING, hdrs.EXPECT, hdrs.TRANSFER_ENCODING, hdrs.UPGRADE)
"""Headers of requests that are always parsed."""


class LastRequest(NamedTuple):
    """The request that came last on a connection."""

    payload: object
    """aiohttp's, which identifies it."""
    head: bytes
    body: bytes | None
    """Its body, if that came in one piece with its head and is short."""


RELIED_ON = (
    "_close", "_current_request", "_force_close", "_loop", "_messages",
    "_next_keepalive_close_time", "_paused", "_request_count", "_upgraded", "_waiter",
)  # fmt: skip
"""aiohttp's own attributes without which there is no short way."""


class Connection(web.RequestHandler):
    """A connection, with errors in OpenAI's shape.

    It closes if no head comes: the first within `timeout_s`, a further one within the keep-alive
    timeout.

    A half-closed client may wait for its answer, as `nc -N` does, or have gone. Both look alike
    until something is sent (RFC 9293, section 3.6). So an answer that comes soon is sent, and a
    client that waits longer gets a `100 Continue` now and then. Clients ignore it (RFC 9110,
    section 15.2.1), and sending it fails if the client has gone, so that no engine works for it.
    Where none may be sent, to HTTP/1.0 and within a response, a half-closed client counts as gone.
    So it does over TLS, which closes both directions at once, and over WebSockets.

    **The short way in.** Known requests are answered without aiohttp. The account `_owed` says
    where its parser stands, so that bytes are looked up only where a request begins: it is the
    number of bytes that are missing of the last request's body. Where a request isn't framed by a
    length, or several came at once, the account is lost and the connection stays on the long way.

    Args:
        server: aiohttp's.
        timeout_s: seconds for the first head.
        known: the known requests; `None` to parse all requests.
    """

    def __init__(self, server: web.Server, timeout_s: float, known: KnownRequests | None) -> None:
        # None turns aiohttp's own access log off, but its type doesn't allow it.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=_KEEP_ALIVE_S,
            # aiohttp would accept a compressed body that was cut short.
            auto_decompress=False,
        )
        missing = tuple(name for name in RELIED_ON if not hasattr(self, name))
        if missing:
            _log_missing(missing)
        self._is_followed = not missing
        self._timeout_s, self._known = timeout_s, None if missing else known
        self._owed = 0
        self.last: LastRequest | None = None
        """The last request, if it is framed by a length."""
        # What waits for the rest of its request, or for its turn.
        self._held: list[bytes] = []
        self._held_bytes = self._held_until_bytes = 0
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = self._loop.call_later(self._timeout_s, self._close_without_head)
        if self.ssl_context is not None:
            self._known = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        self._take_held()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # aiohttp calls this itself, without bytes, to go on parsing.
        if not data or not self._is_followed:
            super().data_received(data)
            return
        if (known := self._known) is None:
            self._parse(data)
            return
        pieces = [data]
        if self._held:
            self._hold(data)
            if self._held_bytes < self._held_until_bytes:
                return
            pieces = self._take_held()
        elif self._owed == 0 and (self._paused or self._is_ending()):
            # The client was quicker than aiohttp's task, which is idle a turn later, or has read
            # all of a long answer before we heard of it.
            known.wait(self)
            self._hold(data)
            return
        self._receive(pieces, known)

    def _receive(self, pieces: list[bytes], known: KnownRequests) -> None:
        """Answer what has come, if it is a known request; otherwise parse it."""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._owed == 0 and self._is_idle():
            if (request := known.find(known.digest(data))) is None:
                if (length := known.length_of(data)) > len(data):
                    self._held_until_bytes = length
                    self._rest_timer = self._loop.call_later(_REST_S, self._release)
                    self._hold(data)
                    return
            elif not known.takes_turn(self):
                self._hold(data)
                return
            elif (answer := known.answer(request)) is not None and self.transport is not None:
                # What aiohttp would have done, too.
                self._request_count += 1
                self._next_keepalive_close_time = self._loop.time() + _KEEP_ALIVE_S
                self.transport.write(answer)
                return
        self._parse_each(pieces)

    def resume(self) -> None:
        """Go on with a request that has waited for its turn."""
        if self._held and not self._held_until_bytes and self._known is not None:
            self._receive(self._take_held(), self._known)

    def remember(self, http: HttpRequest, body: bytes, request: KnownRequest) -> None:
        """Answer the bytes of `http`, whose body is `body`, by `request` from now on.

        Nothing is remembered where its bytes aren't its head and `body`, or close the connection.
        """
        last, headers = self.last, http.headers
        if (
            self._known is not None
            and last is not None
            and last.payload is http.content
            and self._owed == 0
            and http.keep_alive
            and http.version == HttpVersion11
            and not any(name in headers for name in _NOT_KNOWN)
        ):
            self._known.offer(last.head, body, request)

    def close_if_idle(self, for_s: float) -> None:
        """Close it if nothing is under way on it, nor has been for so long."""
        if not self._is_followed:
            self.close()
        elif self._is_idle() and self._owed <= 0 and not self._held:
            idle_since = self._next_keepalive_close_time - _KEEP_ALIVE_S
            if self._loop.time() - idle_since >= for_s:
                self.force_close()

    def _is_ending(self) -> bool:
        """Whether a request has been handled, and aiohttp's task doesn't wait yet."""
        return self._waiter is None and self._current_request is None and not self._messages

    def _is_idle(self) -> bool:
        """Whether aiohttp waits for the next request, and the client reads."""
        return (
            self._waiter is not None
            and not self._messages
            and not self._upgraded
            and not self._paused
            and not self._close
            and not self._force_close
        )

    def _parse(self, data: bytes) -> None:
        """Give bytes to aiohttp, and keep the account of where its parser stands."""
        owed, messages = self._owed, self._messages
        queued = len(messages)
        super().data_received(data)
        if owed:
            self._owed = max(owed - len(data), _LOST) if owed > 0 else _LOST
            return
        self._owed = _LOST
        if len(messages) != queued + 1:
            return
        message, payload = messages[-1]
        body_at = data.find(b"\r\n\r\n") + 4
        body_bytes = len(data) - body_at
        if body_at < 4 or payload.total_bytes != body_bytes:
            # Chunks, or bytes of another request.
            return
        head, body = data[:body_at], None
        if payload.is_eof():
            self._owed = 0
            if body_bytes <= _SHORT_BYTES:
                body = data[body_at:]
        # Only a request that could be read has a body that is still to come.
        elif (length := message.headers.get(hdrs.CONTENT_LENGTH)) is not None:  # type: ignore[union-attr]
            self._owed = int(length) - body_bytes
        self.last = _new(LastRequest, (payload, head, body))

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def _take_held(self) -> list[bytes]:
        """Return what is held, as it came, and hold nothing any more."""
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        pieces = self._held
        self._held, self._held_bytes, self._held_until_bytes = [], 0, 0
        return pieces

    def _release(self) -> None:
        """Give aiohttp what is held: the rest doesn't come soon, so its timeouts are to hold."""
        self._parse_each(self._take_held())

    def _parse_each(self, pieces: list[bytes]) -> None:
        # Of pieces in one, aiohttp would drop the requests before one that is invalid.
        for piece in pieces:
            self._parse(piece)

    # aiohttp's method returns nothing, which closes the connection.
    def eof_received(self) -> bool:  # type: ignore[override]
        self._release()
        if not self._owes_response():
            return False
        # Of several pipelined requests, it isn't known here when the last one is answered.
        self._close = len(self._messages) + (self._waiter is None) == 1
        self._deadline.cancel()
        self._deadline = self._loop.call_later(_PRESENCE_CHECK_S, self._check_presence)
        return True

    def _owes_response(self) -> bool:
        """Whether all of the last request has come, and its response has not begun."""
        if self.ssl_context is not None or self._upgraded or not self._request_count:
            return False
        if self._messages:
            return self._messages[-1][1].is_eof()
        if (http := self._current_request) is not None:
            return http.content.is_eof() and not http.writer.output_size
        return self._waiter is None

    def _check_presence(self) -> None:
        http, transport = self._current_request, self.transport
        if transport is None:
            return
        if http is not None and not http.writer.output_size:
            if http.version < HttpVersion11:
                transport.close()
                return
            transport.write(CONTINUE)
        elif self._waiter is not None and not self._messages:
            transport.close()
            return
        self._deadline = self._loop.call_later(_PRESENCE_CHECK_S, self._check_presence)

    def _close_without_head(self) -> None:
        if not self._request_count:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        # aiohttp's text quotes the request, and so perhaps a prompt.
        logger.info("a request could not be read: %s", type(exc).__name__ if exc else message)
        mistakes = (known for kind, known in _MISTAKES.items() if isinstance(exc, kind))
        status, text = next(mistakes, (status, f"{_INVALID}."))
        response = error_response(status, text)
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def log_exception(self, *args: Any, **more: Any) -> None:
        # The client got an error for an invalid body; it is no failure of ours.
        if not isinstance(more.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **more)


@lru_cache(1)
def _log_missing(names: tuple[str, ...]) -> None:
    logger.error("aiohttp has no %s, so known requests are parsed, too", ", ".join(names))
