"""The listening sockets, and aiohttp's server behind them, until its last connection ends."""

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from aiohttp import web

from server.config.schema import ServerConfig, is_dual
from server.process import Draining
from server.web.connection import Connection
from server.web.known_requests import KnownRequests
from server.web.request import Endpoint, HttpRequest

logger = logging.getLogger(__name__)

BACKLOG = 1024
"""How many connections may wait at a listening socket."""
_LOOK_EVERY_S = 0.02
# The first request of a connection comes a round trip after it was accepted; that of a client which
# asks one after the other, soon after the answer before.
_IDLE_S = 1.0
# For handlers that are cancelled. aiohttp takes 0 for no limit.
_CUT_S = 0.5


def make_server(
    endpoint: Endpoint, options: ServerConfig, draining: Draining | None = None
) -> web.Server:
    """Return aiohttp's low-level server; its `Application` would double the cost of a hit."""

    class Request(HttpRequest):
        client_timeout_s = options.client_timeout_s
        max_body_bytes = options.max_body_bytes

    Request.draining = draining or Draining()

    loop = asyncio.get_running_loop()
    make_request = partial(Request, loop=loop, client_max_size=options.max_body_bytes)
    # The handler gets what the factory makes, but aiohttp's types don't express it.
    return web.Server(endpoint, request_factory=make_request, handler_cancellation=True)  # type: ignore[arg-type]


async def listen(
    server: web.Server,
    host: str,
    port: int,
    options: ServerConfig,
    tls: ssl.SSLContext | None,
    known: KnownRequests | None = None,
) -> asyncio.Server:
    """Accept connections for `server`; requests that are `known` are answered without parsing.

    Raises:
        OSError: it can't listen at the address.
    """
    protocol = partial(Connection, server, options.client_timeout_s, known)
    loop = asyncio.get_running_loop()
    timeout_s = None if tls is None else options.client_timeout_s
    address: dict[str, Any] = {"host": host, "port": port}
    try:
        if is_dual(host):
            address = {"sock": _dual_stack_socket(port)}
        return await loop.create_server(
            protocol, **address, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=timeout_s
        )
    except OSError as exc:
        why = exc.strerror if isinstance(exc, socket.gaierror) else os.strerror(exc.errno or 0)
        raise OSError(exc.errno, f"can't listen at {host} port {port}: {why}") from exc


async def listen_at(
    server: web.Server,
    bound: socket.socket,
    options: ServerConfig,
    tls: ssl.SSLContext | None,
    known: KnownRequests | None,
) -> asyncio.Server:
    """Accept connections for `server` at a bound socket, otherwise as `listen`."""
    protocol = partial(Connection, server, options.client_timeout_s, known)
    return await asyncio.get_running_loop().create_server(
        protocol,
        sock=bound,
        backlog=BACKLOG,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else options.client_timeout_s,
    )


def _dual_stack_socket(port: int) -> socket.socket:
    """Return a socket that is bound for IPv6 and IPv4; asyncio would bind IPv6 alone."""
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
    )


def addresses(listener: asyncio.Server, tls: ssl.SSLContext | None) -> str:
    """Return the URLs of a listener, for the log."""
    return urls(listener.sockets, tls)


def urls(sockets: Iterable[socket.socket], tls: ssl.SSLContext | None) -> str:
    """Return the URLs of listening sockets, for the log."""
    scheme = "http" if tls is None else "https"
    names = [each.getsockname()[:2] for each in sockets]
    return ", ".join(f"{scheme}://{f'[{h}]' if ':' in h else h}:{p}" for h, p in names)


async def listen_unix(
    server: web.Server, bound: socket.socket, options: ServerConfig
) -> asyncio.Server:
    """Accept connections for `server` at a bound Unix socket."""
    protocol = partial(Connection, server, options.client_timeout_s, None)
    return await asyncio.get_running_loop().create_unix_server(protocol, sock=bound)


async def accept(server: web.Server, connection: socket.socket, options: ServerConfig) -> None:
    """Serve one connection, which exists already."""
    protocol = partial(Connection, server, options.client_timeout_s, None)
    await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)


async def end_connections(server: web.Server, grace_s: float) -> None:
    """Close each connection once nothing is under way on it, and cut the rest after `grace_s`.

    The listeners are closed already. aiohttp's own shutdown would drop what still comes of a
    request's body, and close connections on which the next request is about to come, such as after
    a stream that had begun before it could say `Connection: close`.

    A request that is on its way on a connection which has idled for a second is lost: HTTP/1.1
    can't close one without that (RFC 9112, section 9.5). So clients are asked to leave before, by
    `Connection: close` in the answers while the server drains (section 9.6).
    """
    until = time.monotonic() + grace_s
    while server.connections and time.monotonic() <= until:
        for connection in server.connections:
            if isinstance(connection, Connection):
                connection.close_if_idle(_IDLE_S)
        await asyncio.sleep(_LOOK_EVERY_S)
    if under_way := len(server.connections):
        logger.warning("cutting %d connections after server.shutdown_grace_s", under_way)
    runner = web.ServerRunner(server, shutdown_timeout=_CUT_S)
    await runner.setup()
    await runner.cleanup()
