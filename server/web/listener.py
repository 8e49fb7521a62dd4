"""The listening sockets, and the protocol: its timeouts, half-closed clients, and invalid HTTP."""

import asyncio
import logging
import socket
import ssl
from functools import partial
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMethod, BadStatusLine, InvalidURLError, LineTooLong

from server.config.base import SERVER
from server.config.schema import ServerConfig, is_dual
from server.web.request import CONTINUE, Endpoint, HttpRequest
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
_BACKLOG = 1024
# Longer than clients and proxies keep idle connections, so that they close them and we don't.
_KEEP_ALIVE_S = 630
# Between two checks whether a half-closed client is still there.
_PRESENCE_CHECK_S = 0.5


class _Protocol(web.RequestHandler):
    """aiohttp's HTTP/1.1 protocol, with errors in OpenAI's shape.

    A connection closes if no head comes: the first within `client_timeout_s`, a further one within
    the keep-alive timeout.

    A half-closed client may wait for its answer, as `nc -N` does, or have gone. Both look alike
    until something is sent (RFC 9293, section 3.6). So an answer that comes soon is sent, and a
    client that waits longer gets a `100 Continue` now and then. Clients ignore it (RFC 9110,
    section 15.2.1), and sending it fails if the client has gone, so that no engine works for it.
    Where none may be sent, to HTTP/1.0 and within a response, a half-closed client counts as gone.
    So it does over TLS, which closes both directions at once, and over WebSockets.
    """

    def __init__(self, server: web.Server, timeout_s: float) -> None:
        # None turns aiohttp's own access log off, but its type doesn't allow it.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=_KEEP_ALIVE_S,
            # aiohttp would accept a compressed body that was cut short.
            auto_decompress=False,
        )
        self._timeout_s = timeout_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._timeout_s, self._close_without_head)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    # aiohttp's method returns nothing, which closes the connection.
    def eof_received(self) -> bool:  # type: ignore[override]
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
        logger.info("a request could not be read: %s", exc or message)
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


def make_server(endpoint: Endpoint, options: ServerConfig) -> web.Server:
    """Return aiohttp's low-level server; its `Application` would double the cost of a hit."""

    class Request(HttpRequest):
        client_timeout_s = options.client_timeout_s

    loop = asyncio.get_running_loop()
    make_request = partial(Request, loop=loop, client_max_size=options.max_body_bytes)
    # The handler gets what the factory makes, but aiohttp's types don't express it.
    return web.Server(endpoint, request_factory=make_request, handler_cancellation=True)  # type: ignore[arg-type]


async def listen(
    server: web.Server, host: str, port: int, options: ServerConfig, tls: ssl.SSLContext | None
) -> asyncio.Server:
    """Accept connections for `server`.

    Raises:
        OSError: it can't listen at the address.
    """
    protocol = partial(_Protocol, server, options.client_timeout_s)
    loop = asyncio.get_running_loop()
    timeout_s = None if tls is None else options.client_timeout_s
    address: dict[str, Any] = {"host": host, "port": port}
    if is_dual(host):
        address = {"sock": _dual_stack_socket(port)}
    return await loop.create_server(
        protocol, **address, backlog=_BACKLOG, ssl=tls, ssl_handshake_timeout=timeout_s
    )


def _dual_stack_socket(port: int) -> socket.socket:
    """Return a socket that is bound for IPv6 and IPv4; asyncio would bind IPv6 alone."""
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
    )


def addresses(listener: asyncio.Server, tls: ssl.SSLContext | None) -> str:
    """Return the URLs of a listener, for the log."""
    scheme = "http" if tls is None else "https"
    names = [each.getsockname()[:2] for each in listener.sockets]
    return ", ".join(f"{scheme}://{f'[{h}]' if ':' in h else h}:{p}" for h, p in names)


async def listen_unix(
    server: web.Server, bound: socket.socket, options: ServerConfig
) -> asyncio.Server:
    """Accept connections for `server` at a bound Unix socket."""
    protocol = partial(_Protocol, server, options.client_timeout_s)
    return await asyncio.get_running_loop().create_unix_server(protocol, sock=bound)
