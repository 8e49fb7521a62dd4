"""Upstreams: the engines' HTTP servers, whether each answers, and whose turn it is."""

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

_CONNECT_S = 5
# Gateways may ask others before they list their models.
_PROBE_S = 30
# It may have to wait for those that are queued before it.
_TOKEN_S = 60
# Below the five seconds after which vLLM closes a connection that idles: one that is closed while
# a request is on its way fails it.
_KEEP_ALIVE_S = 3
_PROBE_DOWN_S = 0.5
_PROBE_UP_S = 2.0
# Methods of requests that may be sent twice (RFC 9110, section 9.2.2).
_IDEMPOTENT = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PUT", "TRACE"})
_Reply = TypeVar("_Reply", aiohttp.ClientResponse, aiohttp.ClientWebSocketResponse)


class UnavailableError(Exception):
    """No upstream takes a request at present; the text is for the client."""

    def __init__(self, text: str = "The engine is starting or down; try again.") -> None:
        super().__init__(text)


class Upstream:
    """One engine's HTTP server, by TCP or over a Unix socket.

    Args:
        url: its base address, perhaps with a user and a password, which it is sent in place of
            what clients send.
        socket: the path of its Unix socket, if it listens on one.
        timeout_s: seconds that it may stay silent within an answer.
        name: what logs call it; by default its address.
        api_key: what it is to be sent in place of what clients send.
        model: by which it knows the model, where it may be another tierserve.
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
        # In the address it would fail requests whose client sends one of its own.
        self.url = str(base.with_user(None)).rstrip("/")
        self._name = name or self.url
        self._key = {}
        if api_key is not None:
            self._key = {"Authorization": f"Bearer {api_key}"}
        elif base.user is not None:
            basic = aiohttp.encode_basic_auth(base.user, base.password or "", "utf-8")
            self._key = {"Authorization": basic}
        self._ready_since: float | None = None
        self.answers = asyncio.Event()
        """Set while it is ready."""
        self._model = model
        self.loading = False
        """Whether it isn't ready, but a tierserve that answers what its tiers hold."""
        self._socket = socket
        self._replied_at = 0.0
        self._told: tuple[bool, str] | None = None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=timeout_s)
        self._session = self._new_session(timeout)
        self.fresh = self._new_session(timeout, keep=False)
        """Makes a connection for each request."""
        # Of its own, so that a probe never waits for a busy connection. Each probe makes a new one,
        # since an old one may work on where nobody can connect any more.
        self._probing = self._new_session(
            aiohttp.ClientTimeout(total=_PROBE_S), self._key, keep=False
        )

    def with_key(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a request to this upstream."""
        if not self._key:
            return headers
        keyed = CIMultiDict(headers)
        keyed.pop("x-api-key", None)
        keyed.update(self._key)
        return keyed

    def _new_session(
        self,
        timeout: aiohttp.ClientTimeout,
        headers: Mapping[str, str] | None = None,
        *,
        keep: bool = True,
    ) -> aiohttp.ClientSession:
        options: dict[str, Any] = {"limit": 0}
        options |= {"keepalive_timeout": _KEEP_ALIVE_S} if keep else {"force_close": True}
        connector: aiohttp.BaseConnector
        if self._socket is None:
            connector = aiohttp.TCPConnector(**options)
        else:
            connector = aiohttp.UnixConnector(self._socket, **options)
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers=headers,
            auto_decompress=False,
            # A header that a client leaves out may mean something, too.
            skip_auto_headers=("Accept", "Content-Type", "User-Agent"),
            trace_configs=[reuse],
        )

    async def request(
        self, method: str, path: str, data: Any, headers: Mapping[str, str], *, repeatable: bool
    ) -> aiohttp.ClientResponse:
        """Ask it, and return its reply as it begins.

        An upstream may close an idle connection just when a request goes out on it. A request that
        may be sent twice is then sent once more; any other always has a connection of its own.
        """
        url = URL(self.url + path, encoded=True)
        ask = partial(
            aiohttp.ClientSession.request,
            method=method,
            url=url,
            data=data,
            headers=self.with_key(headers),
            allow_redirects=False,
        )
        if (repeatable or method in _IDEMPOTENT) and isinstance(data, bytes | None):
            attempt = _Attempt()
            try:
                reply = await ask(self._session, trace_request_ctx=attempt)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError) as exc:
                if not attempt.was_too_late(exc):
                    raise
                reply = await ask(self.fresh)
        else:
            reply = await ask(self.fresh)
        if reply.status < 500:
            self._replied_at = time.monotonic()
        return reply

    @property
    def ready(self) -> bool:
        """Whether it answered when it was last asked."""
        return self._ready_since is not None

    @ready.setter
    def ready(self, ready: bool) -> None:
        if ready != self.ready:
            self._ready_since = time.monotonic() if ready else None
            (self.answers.set if ready else self.answers.clear)()

    @property
    def ready_since(self) -> float | None:
        """Since when it has been ready (monotonic s); `None` if it isn't."""
        return self._ready_since

    @property
    def ready_s(self) -> float:
        """Seconds for which it has been ready; 0 if it isn't."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    async def watch(self) -> None:
        """Keep `ready` true to whether the upstream answers, until cancelled."""
        while True:
            self._find(*await self._look())
            await asyncio.sleep(_PROBE_UP_S if self.ready else _PROBE_DOWN_S)

    def takes_no_connection(self, exc: Exception) -> None:
        """Take note that nothing reached it; it is asked again once it is back."""
        self._find(False, False, _unconnected(exc))

    def _find(self, ready: bool, loading: bool, why: str) -> None:
        self.ready, self.loading = ready, loading
        if (told := (ready, why)) != self._told:
            self._told = told
            state = "ready" if ready else "not ready"
            logger.info("%s is %s%s", self._name, state, why and f": {why}")

    async def _look(self) -> tuple[bool, bool, str]:
        """Return whether it is ready, whether it is loading, and what the log should say of it.

        Any status below 500 counts as ready: an upstream may want a key, or have no such route.
        """
        began = time.monotonic()
        try:
            async with self._probing.get(f"{self.url}/v1/models") as response:
                status = response.status
                why = "" if status in (200, 401, 403) else f"GET /v1/models has status {status}"
                if status >= 500:
                    return False, False, why
                if response.headers.get("Server") != SERVER:
                    return True, False, why
            async with self._probing.get(
                f"{self.url}/ready", params={"model": self._model}
            ) as response:
                loading = response.status == 503
                return not loading, loading, "its own engine isn't" if loading else ""
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            return False, False, _unconnected(exc)
        except TimeoutError:
            if self._replied_at > began:
                return True, False, ""
            return False, False, f"GET /v1/models has no answer after {_PROBE_S} s"
        except (aiohttp.ClientError, OSError) as exc:
            return False, False, f"GET /v1/models fails ({type(exc).__name__})"

    async def close(self) -> None:
        """Close all connections."""
        for session in (self._session, self.fresh, self._probing):
            await session.close()


class _Attempt:
    """One attempt to send a request over a connection that may have idled."""

    def __init__(self) -> None:
        self.is_reused = False
        self._began = time.monotonic()

    def was_too_late(self, exc: Exception) -> bool:
        """Whether it failed because the connection had been closed before.

        That shows at once; an upstream that closes it later, or has begun to reply, may have got
        the request.
        """
        has_begun = isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(
            exc.message, str
        )
        is_soon = time.monotonic() - self._began < _CONNECT_S
        return self.is_reused and is_soon and not has_begun


def _unconnected(exc: Exception) -> str:
    return f"it takes no connection ({getattr(exc, 'strerror', None) or 'in time'})"


async def _note_reuse(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.is_reused = True


class Upstreams:
    """All upstreams, asked in turn.

    Args:
        upstreams: the engines' servers.
        max_requests: at each of them at once; those it can't run yet wait there.
    """

    def __init__(self, upstreams: Sequence[Upstream], *, max_requests: int) -> None:
        self.all = tuple(upstreams)
        self._most, self._asked = max_requests * len(self.all), 0
        self._turn = itertools.count()

    @property
    def asked(self) -> int:
        """How many requests are at the upstreams now."""
        return self._asked

    @property
    def ready(self) -> bool:
        """Whether any upstream answers."""
        return any(upstream.ready for upstream in self.all)

    @property
    def loading(self) -> bool:
        """Whether any upstream is a tierserve that waits for its engine."""
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
        """Ask the next upstream that takes the connection; gives the reply as it begins.

        `repeatable` says that nothing but an answer comes of it, so that it may be sent twice.

        Raises:
            UnavailableError: none answers, or they have too much to do.
            aiohttp.ClientError: the one that was asked failed.
        """
        return self._ask(
            method,
            headers,
            lambda upstream, headers: upstream.request(
                method, path, data, headers, repeatable=repeatable
            ),
        )

    def websocket(
        self, path: str, headers: Mapping[str, str], protocols: Sequence[str], *, max_bytes: int
    ) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open a WebSocket to the next upstream that takes it; a message may have `max_bytes`.

        Raises:
            UnavailableError: none answers, or they have too much to do.
            aiohttp.ClientError: the one that was asked failed or refused.
        """
        return self._ask(
            "GET",
            headers,
            lambda upstream, headers: upstream.fresh.ws_connect(
                URL(upstream.url + path, encoded=True),
                headers=upstream.with_key(headers),
                protocols=protocols,
                max_msg_size=max_bytes,
            ),
        )

    async def goes_on(
        self, reply: aiohttp.ClientResponse, path: str, model: str, headers: Mapping[str, str]
    ) -> bool:
        """Whether the engine that gave a reply generates still, and so had not begun to stop then.

        A vLLM that stops aborts what it is asked for from then on, one token too. What doesn't
        have its route for that is no vLLM.

        Args:
            reply: read to its end.
            path: that was asked.
            model: that it is of, by the engine's name.
            headers: of the request.
        """
        upstream = next(u for u in self.all if URL(u.url + path, encoded=True) == reply.url)
        # One that caches answers, too, is asked for a new one.
        headers = CIMultiDict(upstream.with_key(headers))
        headers[hdrs.CACHE_CONTROL] = "no-store"
        try:
            async with (
                asyncio.timeout(_TOKEN_S),
                upstream.fresh.post(
                    f"{upstream.url}/v1/completions",
                    json={"model": model, "prompt": "a", "max_tokens": 1},
                    headers=headers,
                ) as token,
            ):
                body = await token.read()
                if token.status in (404, 405):
                    return True
                ends = orjson.loads(body)["choices"][0]["finish_reason"]
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            ends = None
        if ends in ("length", "stop"):
            return True
        logger.info("an answer isn't kept: its engine made no further token, as if it stopped")
        return False

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        headers: Mapping[str, str],
        ask: Callable[[Upstream, Mapping[str, str]], Awaitable[_Reply]],
    ) -> AsyncIterator[_Reply]:
        """Give what the first upstream says, and close it; counts as asked meanwhile."""
        if self._asked >= self._most:
            raise UnavailableError("The engine has as many requests as it takes; try again.")
        self._asked += 1
        try:
            with engine_request(method) as traced:
                handed_on = traced.inject(headers)
                async with await self._first(lambda upstream: ask(upstream, handed_on)) as reply:
                    if isinstance(reply, aiohttp.ClientResponse):
                        traced.set_reply(reply.status, reply.url.host, reply.url.port)
                    yield reply
        finally:
            self._asked -= 1

    async def _first(self, ask: Callable[[Upstream], Awaitable[_Reply]]) -> _Reply:
        """Return what the first upstream says that takes the connection."""
        while True:
            upstream = self._pick()
            try:
                return await ask(upstream)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
                # Nothing was sent yet, so the next one is asked.
                upstream.takes_no_connection(exc)

    def _pick(self) -> Upstream:
        ready = [upstream for upstream in self.all if upstream.ready]
        ready = ready or [upstream for upstream in self.all if upstream.loading]
        if not ready:
            raise UnavailableError
        return ready[next(self._turn) % len(ready)]

    async def close(self) -> None:
        """Close all connections."""
        for upstream in self.all:
            await upstream.close()
