"""Upstreams: the engines' HTTP servers, whether each is ready, and which one gets a request."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import aiohttp
import orjson
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from server.config.base import SERVER
from server.telemetry.spans import engine_request

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5
# A gateway may ask other servers before it lists its models.
_PROBE_TIMEOUT_S = 30
# The token may wait for requests that are queued before it.
_TOKEN_TIMEOUT_S = 60
# vLLM closes an idle connection after five seconds, which fails a request that is on its way then.
_KEEP_ALIVE_S = 3
_PROBE_EVERY_DOWN_S = 0.5
_PROBE_EVERY_UP_S = 2.0
# Methods of requests that may be sent twice (RFC 9110, section 9.2.2).
_IDEMPOTENT = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PUT", "TRACE"})
_Reply = TypeVar("_Reply", aiohttp.ClientResponse, aiohttp.ClientWebSocketResponse)


class UnavailableError(Exception):
    """No upstream takes a request now; the client gets the text."""

    def __init__(self, text: str = "The engine is starting or down; try again.") -> None:
        super().__init__(text)


class Upstream:
    """One engine's HTTP server, by TCP or over a Unix socket.

    Args:
        url: its base address. A user and a password in it replace clients' credentials.
        timeout_s: how long it may send nothing within a reply.
        socket: the path of its Unix socket, if its engine is ours. Then a supervisor calls
            `mark_started` and `mark_stopped`.
        name: its name in logs; by default its address.
        api_key: replaces clients' credentials.
        model: the model's name there; needed only where the upstream is another tierserve.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        socket: str | None = None,
        name: str = "",
        api_key: str | None = None,
        model: str = "",
    ) -> None:
        base = URL(url)
        # aiohttp refuses a request with both a user in its URL and an `Authorization` header.
        self.url = str(base.with_user(None)).rstrip("/")
        self._name = name or self.url
        self._credentials = _credentials(base, api_key)
        self._ready_since: float | None = None
        self.ready_event = asyncio.Event()
        """Set while it is ready."""
        self.loading = False
        """Whether it is a tierserve whose engine isn't ready: it answers what its tiers hold."""
        self._model, self._socket, self._is_stopped = model, socket, False
        self._replied_at = 0.0
        self._logged: tuple[bool, str] | None = None
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s
        )
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_mark_reused)
        connector = self._connector(keepalive_timeout=_KEEP_ALIVE_S)
        self._pooled = _session(connector, timeout, trace_configs=[reuse])
        self.unpooled = _session(self._connector(force_close=True), timeout)
        """The session that makes a new connection for each request."""
        # Each probe makes a connection: old ones may work where new ones are refused.
        self._probe_session = _session(
            self._connector(force_close=True),
            aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S),
            headers=self._credentials,
        )

    def with_credentials(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a request to this upstream."""
        if not self._credentials:
            return headers
        changed = CIMultiDict(headers)
        changed.pop("x-api-key", None)
        changed.update(self._credentials)
        return changed

    def _connector(self, **options: Any) -> aiohttp.BaseConnector:
        if self._socket is None:
            return aiohttp.TCPConnector(limit=0, **options)
        return aiohttp.UnixConnector(self._socket, limit=0, **options)

    async def request(
        self, method: str, path: str, data: Any, headers: Mapping[str, str], *, repeatable: bool
    ) -> aiohttp.ClientResponse:
        """Send a request, and return the reply when it begins.

        An upstream may close an idle connection just when a request goes out on it. A request that
        may be sent twice is sent once more then; any other always has a new connection.
        """
        send = partial(
            aiohttp.ClientSession.request,
            method=method,
            url=self.url_of(path),
            data=data,
            headers=self.with_credentials(headers),
            allow_redirects=False,
        )
        if (repeatable or method in _IDEMPOTENT) and isinstance(data, bytes | None):
            attempt = _Attempt()
            try:
                reply = await send(self._pooled, trace_request_ctx=attempt)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError) as exc:
                if not attempt.met_closed_connection(exc):
                    raise
                reply = await send(self.unpooled)
        else:
            reply = await send(self.unpooled)
        if reply.status < 500:
            self._replied_at = time.monotonic()
        return reply

    def url_of(self, path: str) -> URL:
        """Return the URL of a path, which may have a query."""
        return URL(self.url + path, encoded=True)

    @property
    def ready(self) -> bool:
        """Whether it takes requests, by the last probe or by what happened since."""
        return self._ready_since is not None

    @ready.setter
    def ready(self, ready: bool) -> None:
        ready = ready and not self._is_stopped
        if ready != self.ready:
            self._ready_since = time.monotonic() if ready else None
            (self.ready_event.set if ready else self.ready_event.clear)()

    @property
    def ready_since(self) -> float | None:
        """Since when it has been ready (monotonic s); `None` if it isn't."""
        return self._ready_since

    @property
    def ready_s(self) -> float:
        """Seconds for which it has been ready; 0 if it isn't."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    def mark_started(self) -> None:
        """Let probes find it ready again."""
        self._is_stopped = False

    def mark_stopped(self) -> None:
        """Set `ready` to false until it is started; called before its engine is stopped.

        An engine that stops may still answer probes, but aborts its answers.
        """
        self._is_stopped, self.ready = True, False

    async def watch(self) -> None:
        """Probe the upstream and set `ready`, until cancelled."""
        while True:
            self._set_state(*await self._probe())
            await asyncio.sleep(_PROBE_EVERY_UP_S if self.ready else _PROBE_EVERY_DOWN_S)

    def mark_unreachable(self, exc: Exception) -> None:
        """Note that a connection to it failed. It gets requests again after a probe succeeds."""
        self._set_state(False, False, _connection_failure(exc))

    def _set_state(self, ready: bool, loading: bool, why: str) -> None:
        self.ready, self.loading = ready, loading
        if (state := (ready, why)) != self._logged:
            self._logged = state
            words = "ready" if ready else "not ready"
            logger.info("%s is %s%s", self._name, words, why and f": {why}")

    async def _probe(self) -> tuple[bool, bool, str]:
        """Return whether it is ready, whether it is loading, and why, for the log.

        Any status below 500 counts as ready: an upstream may want a key, or lack the route.
        """
        began = time.monotonic()
        try:
            async with self._probe_session.get(f"{self.url}/v1/models") as response:
                status = response.status
                why = "" if status in (200, 401, 403) else f"GET /v1/models has status {status}"
                if status >= 500:
                    return False, False, why
                if response.headers.get("Server") != SERVER:
                    return True, False, why
            async with self._probe_session.get(
                f"{self.url}/ready", params={"model": self._model}
            ) as response:
                loading = response.status == 503
                return not loading, loading, "its own engine isn't" if loading else ""
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            return False, False, _connection_failure(exc)
        except TimeoutError:
            if self._replied_at > began:
                return True, False, ""
            return False, False, f"GET /v1/models has no answer after {_PROBE_TIMEOUT_S} s"
        except (aiohttp.ClientError, OSError) as exc:
            return False, False, f"GET /v1/models fails ({type(exc).__name__})"

    async def keeps_generating(
        self, *, since: float, model: str, headers: Mapping[str, str]
    ) -> bool:
        """Whether its engine has not begun to stop since then (monotonic s).

        An engine of ours stops only after `mark_stopped` (`server.engine.signal_shield`), so it
        need not be asked. Any other is asked for one token: a vLLM that stops aborts this request,
        too.
        """
        if self._socket is not None:
            return self._ready_since is not None and self._ready_since <= since
        headers = CIMultiDict(self.with_credentials(headers))
        # A cache on the way must not answer.
        headers[hdrs.CACHE_CONTROL] = "no-store"
        token = {"model": model, "prompt": "a", "max_tokens": 1}
        url = self.url_of("/v1/completions")
        try:
            async with (
                asyncio.timeout(_TOKEN_TIMEOUT_S),
                self.unpooled.post(url, json=token, headers=headers) as reply,
            ):
                body = await reply.read()
                if reply.status in (404, 405):
                    # It has no such route, so it is no vLLM.
                    return True
                return orjson.loads(body)["choices"][0]["finish_reason"] in ("length", "stop")
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return False

    async def close(self) -> None:
        """Close all connections."""
        for session in (self._pooled, self.unpooled, self._probe_session):
            await session.close()


def _credentials(url: URL, api_key: str | None) -> dict[str, str]:
    if api_key is not None:
        return {"Authorization": f"Bearer {api_key}"}
    if url.user is None:
        return {}
    return {"Authorization": aiohttp.encode_basic_auth(url.user, url.password or "", "utf-8")}


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
        is_soon = time.monotonic() - self._began < _CONNECT_TIMEOUT_S
        return self.is_reused and is_soon and not has_begun


def _connection_failure(exc: Exception) -> str:
    return f"it takes no connection ({getattr(exc, 'strerror', None) or 'in time'})"


async def _mark_reused(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.is_reused = True


class Upstreams:
    """The upstreams of one model, which get requests in turn.

    Args:
        upstreams: the engines' servers.
        max_requests: the requests that each of them may have at once; an engine queues what it
            can't run yet.
    """

    def __init__(self, upstreams: Sequence[Upstream], *, max_requests: int) -> None:
        self.all = tuple(upstreams)
        self._max_in_flight, self._in_flight = max_requests * len(self.all), 0
        self._rotation = itertools.count()

    @property
    def in_flight(self) -> int:
        """The number of requests at the upstreams now."""
        return self._in_flight

    @property
    def ready(self) -> bool:
        """Whether any upstream is ready."""
        return any(upstream.ready for upstream in self.all)

    @property
    def loading(self) -> bool:
        """Whether any upstream is a tierserve whose engine isn't ready."""
        return any(upstream.loading for upstream in self.all)

    def request(
        self,
        method: str,
        path: str,
        *,
        data: Any,
        headers: Mapping[str, str],
        repeatable: bool = False,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request to the next upstream that takes the connection; gives its reply.

        A `repeatable` request has no effect but its reply, so it may be sent twice.

        Raises:
            UnavailableError: no upstream is ready, or they have `max_requests`.
            aiohttp.ClientError: the upstream failed.
        """
        return self._open(
            method,
            headers,
            lambda upstream, headers: upstream.request(
                method, path, data, headers, repeatable=repeatable
            ),
        )

    def websocket(
        self, path: str, headers: Mapping[str, str], protocols: Sequence[str], *, max_bytes: int
    ) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open a WebSocket to the next upstream that takes the connection.

        Args:
            path: may have a query.
            headers: of its handshake.
            protocols: offered to the upstream.
            max_bytes: of one message.

        Raises:
            UnavailableError: no upstream is ready, or they have `max_requests`.
            aiohttp.ClientError: the upstream failed or refused.
        """
        return self._open(
            "GET",
            headers,
            lambda upstream, headers: upstream.unpooled.ws_connect(
                upstream.url_of(path),
                headers=upstream.with_credentials(headers),
                protocols=protocols,
                max_msg_size=max_bytes,
            ),
        )

    async def keeps_generating(
        self,
        reply: aiohttp.ClientResponse,
        *,
        path: str,
        since: float,
        model: str,
        headers: Mapping[str, str],
    ) -> bool:
        """Whether the engine that gave a reply has not begun to stop since the request was sent.

        Args:
            reply: has been read to its end.
            path: of the request.
            since: when it was sent, or earlier (monotonic s).
            model: by the engine's name.
            headers: of the request.
        """
        upstream = next(each for each in self.all if each.url_of(path) == reply.url)
        keeps = await upstream.keeps_generating(since=since, model=model, headers=headers)
        if not keeps:
            logger.info("an answer is not stored: its engine may have been stopped meanwhile")
        return keeps

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        headers: Mapping[str, str],
        send: Callable[[Upstream, Mapping[str, str]], Awaitable[_Reply]],
    ) -> AsyncIterator[_Reply]:
        """Give the reply of the next upstream, count it as in flight, and close it."""
        if self._in_flight >= self._max_in_flight:
            raise UnavailableError("The engine has as many requests as it takes; try again.")
        self._in_flight += 1
        try:
            with engine_request(method) as traced:
                headers = traced.inject(headers)
                async with await self._send_to_next(
                    lambda upstream: send(upstream, headers)
                ) as reply:
                    if isinstance(reply, aiohttp.ClientResponse):
                        traced.set_reply(reply.status, reply.url.host, reply.url.port)
                    yield reply
        finally:
            self._in_flight -= 1

    async def _send_to_next(self, send: Callable[[Upstream], Awaitable[_Reply]]) -> _Reply:
        """Return the reply of the next upstream that takes the connection."""
        while True:
            upstream = self._pick()
            try:
                return await send(upstream)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
                # Nothing was sent, so the next upstream may get it.
                upstream.mark_unreachable(exc)

    def _pick(self) -> Upstream:
        ready = [upstream for upstream in self.all if upstream.ready]
        ready = ready or [upstream for upstream in self.all if upstream.loading]
        if not ready:
            raise UnavailableError
        return ready[next(self._rotation) % len(ready)]

    async def close(self) -> None:
        """Close all connections."""
        for upstream in self.all:
            await upstream.close()
