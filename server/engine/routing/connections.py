"""Connections to one upstream, kept open or made anew."""

import time
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, AddressFamily
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

CONNECT_TIMEOUT_S = 5
# A gateway may ask other servers before it lists its models.
PROBE_TIMEOUT_S = 30
# vLLM closes an idle connection after five seconds, which fails a request that is on its way then.
_KEEP_ALIVE_S = 3


class Connections:
    """The connections to one upstream.

    Args:
        timeout_s: how long it may send nothing within a reply.
        socket: the path of its Unix socket, if it has one.
        ip: the address that stands for any host, if it is known.
        probe_headers: are sent with each probe.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        socket: str | None,
        ip: str | None,
        probe_headers: Mapping[str, str],
    ) -> None:
        def connector(**options: Any) -> aiohttp.BaseConnector:
            if socket is not None:
                return aiohttp.UnixConnector(socket, limit=0, **options)
            resolver = None if ip is None else _OneAddress(ip)
            return aiohttp.TCPConnector(limit=0, resolver=resolver, **options)

        timeout = timeout_of(timeout_s)
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_mark_reused)
        self._pooled = _session(
            connector(keepalive_timeout=_KEEP_ALIVE_S), timeout, trace_configs=[reuse]
        )
        self.unpooled = _session(connector(force_close=True), timeout)
        """The session that makes a new connection for each request."""
        # Each probe makes a connection: old ones may work where new ones are refused.
        self.probing = _session(
            connector(force_close=True),
            aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S),
            headers=probe_headers,
        )
        """The session of probes."""

    async def send_again_if_closed(
        self, send: Callable[..., Awaitable[aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        """Send a request that may be sent twice.

        An upstream may close an idle connection just when a request goes out on it.

        Args:
            send: sends it on a session.
        """
        attempt = _Attempt()
        try:
            return await send(self._pooled, trace_request_ctx=attempt)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError) as exc:
            if not attempt.met_closed_connection(exc):
                raise
            return await send(self.unpooled)

    async def close(self) -> None:
        """Close all of them."""
        for session in (self._pooled, self.unpooled, self.probing):
            await session.close()


def timeout_of(timeout_s: float) -> aiohttp.ClientTimeout:
    """Return the timeout of a request whose reply may pause so long."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s)


class _OneAddress(AbstractResolver):
    """Resolves every host to one address; names in requests and certificates stay as they are."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._family = AF_INET if ip_address(ip).version == 4 else AF_INET6

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: AddressFamily = AF_INET,  # noqa: ARG002
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=self._ip, port=port, family=self._family, proto=0, flags=0
            )
        ]

    async def close(self) -> None:
        pass


def _session(
    connector: aiohttp.BaseConnector, timeout: aiohttp.ClientTimeout, **options: Any
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        # Engines may treat a missing header differently from aiohttp's default.
        skip_auto_headers=("Accept", "Content-Type", "User-Agent"),
        **options,
    )


class _Attempt:
    """One attempt to send a request over a connection that may have idled."""

    def __init__(self) -> None:
        self.is_reused = False
        self._began = time.monotonic()

    def met_closed_connection(self, exc: Exception) -> bool:
        """Whether it failed because the connection had been closed before.

        Such a failure comes at once. An upstream that closes the connection later, or has begun to
        reply, may have received the request.
        """
        has_begun = isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(
            exc.message, str
        )
        is_soon = time.monotonic() - self._began < CONNECT_TIMEOUT_S
        return self.is_reused and is_soon and not has_begun


async def _mark_reused(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.is_reused = True
