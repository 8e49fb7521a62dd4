"""The listening sockets, and HTTP that can't be understood."""

import asyncio
import logging
import re
import socket
import ssl
from functools import partial
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, InvalidURLError, LineTooLong

from server.config.base import SERVER
from server.config.schema import ServerConfig, is_dual
from server.web.request import CONTINUE, Endpoint, HttpRequest
from server.web.responses import error_response

logger = logging.getLogger(__name__)

# Of such as «Bad status line:\n  Invalid HTTP version:\n\n  b'GET / HTTP/9.9'».
_first_words = re.compile(
    r"(?:Bad status line:\s+)?([A-Z][A-Za-z '-]{4,80})(?:[.:]?\n|[.]?$)"
).match
_BACKLOG = 1024
# Longer than clients and proxies keep connections that idle, so that they close them, and not we.
_KEEP_ALIVE_S = 630
# Between two looks whether a client that has closed its direction is there.
_ASK_S = 0.5


class _Protocol(web.RequestHandler):
    """aiohttp's HTTP/1.1 protocol, whose own errors are in OpenAI's shape.

    A connection on which no head comes is closed: a first one within `client_timeout_s`, a further
    one within the time for which it is kept open.

    A client that has closed its direction may still wait for its answer, as `nc -N` does, or have
    gone: both look alike until something is sent (RFC 9293, section 3.6). So an answer that comes
    soon is sent, and a client that waits longer gets a `100 Continue` now and then. Clients ignore
    it (RFC 9110, section 15.2.1), and it shows which have gone, so that no engine works for them.
    Where none may be sent, to HTTP/1.0 and within a response, such a client counts as gone, as it
    does over TLS, which ends in both directions at once, and over WebSockets.
    """

    def __init__(self, server: web.Server, timeout_s: float) -> None:
        # None turns aiohttp's own access log off, which its type doesn't say.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=_KEEP_ALIVE_S,
            # It would take what was cut short for whole.
            auto_decompress=False,
        )
        self._timeout_s = timeout_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._timeout_s, self._expect_head)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    # aiohttp's returns nothing, which closes the connection.
    def eof_received(self) -> bool:  # type: ignore[override]
        if not self._owes_answer():
            return False
        # Of several requests that came at once, the last isn't known here when it is answered.
        self._close = len(self._messages) + (self._waiter is None) == 1
        self._deadline.cancel()
        self._deadline = self._loop.call_later(_ASK_S, self._ask_whether_gone)
        return True

    def _owes_answer(self) -> bool:
        """Whether all of the last request has come, and its response has not begun."""
        if self.ssl_context is not None or self._upgraded or not self._request_count:
            return False
        if self._messages:
            return self._messages[-1][1].is_eof()
        if (http := self._current_request) is not None:
            return http.content.is_eof() and not http.writer.output_size
        return self._waiter is None

    def _ask_whether_gone(self) -> None:
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
        self._deadline = self._loop.call_later(_ASK_S, self._ask_whether_gone)

    def _expect_head(self) -> None:
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
        text = f"The request is not valid HTTP{_reason(exc)}."
        if isinstance(exc, LineTooLong):
            status, text = 431, "The request's target or a header is longer than 8190 bytes."
        response = error_response(status, text)
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def log_exception(self, *args: Any, **more: Any) -> None:
        # A body that is no valid HTTP has been answered, and is no failure of ours.
        if not isinstance(more.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **more)


def _reason(exc: BaseException | None) -> str:
    """Return what is wrong by the parser's words, without the bytes that it shows."""
    if isinstance(exc, BadHttpMessage) and (found := _first_words(exc.message)):
        return f": {found[1]}"
    return ": its target is no URL" if isinstance(exc, InvalidURLError) else ""


def make_server(endpoint: Endpoint, options: ServerConfig) -> web.Server:
    """Return aiohttp's server around one endpoint; its `Application` would double its cost."""

    class Request(HttpRequest):
        client_timeout_s = options.client_timeout_s

    loop = asyncio.get_running_loop()
    make_request = partial(Request, loop=loop, client_max_size=options.max_body_bytes)
    # The handler is given what the factory makes, which aiohttp's types don't say.
    return web.Server(endpoint, request_factory=make_request, handler_cancellation=True)  # type: ignore[arg-type]


async def listen(
    server: web.Server, host: str, port: int, options: ServerConfig, tls: ssl.SSLContext | None
) -> asyncio.Server:
    """Accept connections for `server`.

    Raises:
        OSError: the address can't be had.
    """
    protocol = partial(_Protocol, server, options.client_timeout_s)
    loop = asyncio.get_running_loop()
    timeout_s = None if tls is None else options.client_timeout_s
    where: dict[str, Any] = {"host": host, "port": port}
    if is_dual(host):
        where = {"sock": _of_both_families(port)}
    return await loop.create_server(
        protocol, **where, backlog=_BACKLOG, ssl=tls, ssl_handshake_timeout=timeout_s
    )


def _of_both_families(port: int) -> socket.socket:
    """Return a socket that is bound for IPv6 and IPv4; asyncio's own would refuse IPv4."""
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
    )


def addresses(listener: asyncio.Server, tls: ssl.SSLContext | None) -> str:
    """Return the URLs at which a listener is reached."""
    scheme = "http" if tls is None else "https"
    found = [each.getsockname()[:2] for each in listener.sockets]
    return ", ".join(f"{scheme}://{f'[{h}]' if ':' in h else h}:{p}" for h, p in found)


async def listen_unix(
    server: web.Server, bound: socket.socket, options: ServerConfig
) -> asyncio.Server:
    """Accept connections for `server` at a Unix socket that is bound."""
    protocol = partial(_Protocol, server, options.client_timeout_s)
    return await asyncio.get_running_loop().create_unix_server(protocol, sock=bound)
