"""An upstream: an engine's HTTP server, and whether it is ready."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from server.config.base import SERVER
from server.engine.routing.connections import PROBE_TIMEOUT_S, Connections, timeout_of
from server.engine.routing.ejection import Ejection

logger = logging.getLogger(__name__)

ENGINE_URL = "http://engine"
"""The base address of an engine of ours, on its Unix socket."""
# The token may wait for requests that are queued before it.
_TOKEN_TIMEOUT_S = 60
_PROBE_EVERY_DOWN_S = 0.5
_PROBE_EVERY_UP_S = 2.0
# A count that comes later says little.
_METRICS_TIMEOUT_S = 2.0
_MAX_METRICS_BYTES = 1024**2
_requests_in = re.compile(
    rb"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\d+)(?:\.0)?$", re.MULTILINE
).findall
# Methods of requests that may be sent twice (RFC 9110, section 9.2.2).
_IDEMPOTENT = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PUT", "TRACE"})
# An upstream, or what stands before it, doesn't work.
_FAILED = frozenset({502, 503, 504})
_TOO_MANY_REQUESTS = 429


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
        ip: the address that stands for its host, if it is one of several that a name has.
        name: its name in logs; by default its label.
        api_key: replaces clients' credentials.
        model: the model's name there; needed only where the upstream is another tierserve.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        socket: str | None = None,
        ip: str | None = None,
        name: str = "",
        api_key: str | None = None,
        model: str = "",
    ) -> None:
        base = URL(url)
        # aiohttp refuses a request with both a user in its URL and an `Authorization` header.
        base_url = base.with_user(None)
        self.url = str(base_url).rstrip("/")
        self.label = "engine" if socket is not None else self.url
        """Its name in metrics, and where one of several is chosen."""
        if ip is not None:
            self.label = str(base_url.with_host(ip)).rstrip("/")
        self._name = name or self.label
        self._credentials = _credentials(base, api_key)
        self._ready_since: float | None = None
        self.ready_event = asyncio.Event()
        """Set while it is ready."""
        self.on_ready: Callable[[], None] = lambda: None
        """Called when it becomes ready."""
        self.loading = False
        """Whether it is a tierserve whose engine isn't ready: it answers what its tiers hold."""
        self._model, self._socket, self._is_stopped = model, socket, False
        self._replied_at = 0.0
        self._ejection = Ejection()
        self._logged: tuple[bool, str] | None = None
        self._connections = Connections(
            timeout_s=timeout_s, socket=socket, ip=ip, probe_headers=self._credentials
        )
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Let it send nothing for so long within its replies to requests that come from now on."""
        self._timeout = timeout_of(timeout_s)

    def with_credentials(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a request to this upstream."""
        if not self._credentials:
            return headers
        changed = CIMultiDict(headers)
        changed.pop("x-api-key", None)
        changed.update(self._credentials)
        return changed

    async def request(
        self, method: str, path: str, data: Any, headers: Mapping[str, str], *, repeatable: bool
    ) -> aiohttp.ClientResponse:
        """Send a request, and return the reply when it begins.

        One that may not be sent twice always has a new connection.
        """
        send = partial(
            aiohttp.ClientSession.request,
            method=method,
            url=self.url_of(path),
            data=data,
            headers=self.with_credentials(headers),
            allow_redirects=False,
            timeout=self._timeout,
        )
        try:
            if may_be_sent_twice(method, data, repeatable=repeatable):
                reply = await self._connections.send_again_if_closed(send)
            else:
                reply = await send(self.unpooled)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, aiohttp.ServerTimeoutError):
            # While a client's body is passed on, it may be the client that fails.
            if isinstance(data, bytes | None):
                self._note_failure()
            raise
        if reply.status < 500:
            self._replied_at = time.monotonic()
        if reply.status in _FAILED:
            self._note_failure()
        elif reply.status != _TOO_MANY_REQUESTS:
            self._ejection.clear()
        return reply

    def _note_failure(self) -> None:
        if self._ejection.note_failure():
            logger.warning("%s fails again and again, so it gets no requests for now", self._name)

    @property
    def unpooled(self) -> aiohttp.ClientSession:
        """The session that makes a new connection for each request."""
        return self._connections.unpooled

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
            self._ejection.clear()
            (self.ready_event.set if ready else self.ready_event.clear)()
            if ready:
                self.on_ready()

    @property
    def ready_since(self) -> float | None:
        """Since when it has been ready (monotonic s); `None` if it isn't."""
        return self._ready_since

    @property
    def ready_s(self) -> float:
        """Seconds for which it has been ready; 0 if it isn't."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    @property
    def takes_requests(self) -> bool:
        """Whether it is ready, and hasn't failed again and again of late."""
        return self.ready and not self._ejection.is_out

    def follow(self, ready_since: float | None, *, loading: bool) -> None:
        """Take over what another process knows of it, instead of probing it."""
        self.loading = loading
        if ready_since != self._ready_since:
            # It may have been down since the last report.
            self.ready = False
            self.ready = ready_since is not None
            self._ready_since = ready_since

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
            # Where a connection fails, it need not be down for longer than the next probe.
            waited_s = 0.0
            while waited_s < (_PROBE_EVERY_UP_S if self.ready else _PROBE_EVERY_DOWN_S):
                await asyncio.sleep(_PROBE_EVERY_DOWN_S)
                waited_s += _PROBE_EVERY_DOWN_S

    def mark_unreachable(self, exc: Exception) -> None:
        """Note that a connection to it failed. It gets requests again after a probe succeeds."""
        self._set_state(False, False, _connection_failure(exc))

    def _set_state(self, ready: bool, loading: bool, why: str) -> None:
        self.ready, self.loading = ready, loading
        if (state := (ready, why)) != self._logged:
            self._logged = state
            level = logging.INFO if ready or loading else logging.WARNING
            words = "ready" if ready else "not ready"
            logger.log(level, "%s is %s%s", self._name, words, why and f": {why}")

    async def _probe(self) -> tuple[bool, bool, str]:
        """Return whether it is ready, whether it is loading, and why, for the log.

        Any status below 500 counts as ready: an upstream may want a key, or lack the route.
        """
        began = time.monotonic()
        try:
            async with self._connections.probing.get(f"{self.url}/v1/models") as response:
                status = response.status
                why = "" if status in (200, 401, 403) else f"GET /v1/models has status {status}"
                if status >= 500:
                    return False, False, why
                if response.headers.get("Server") != SERVER:
                    return True, False, why
            async with self._connections.probing.get(
                f"{self.url}/ready", params={"model": self._model}
            ) as response:
                loading = response.status == 503
                return not loading, loading, "its own engine isn't" if loading else ""
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            return False, False, _connection_failure(exc)
        except TimeoutError:
            if self._replied_at > began:
                return True, False, ""
            return False, False, f"GET /v1/models has no answer after {PROBE_TIMEOUT_S} s"
        except (aiohttp.ClientError, OSError) as exc:
            return False, False, f"GET /v1/models fails ({type(exc).__name__})"

    async def count_requests(self) -> int | None:
        """Return how many requests its engine runs or queues, by vLLM's metrics.

        They may come from others than us. `None` if it doesn't say so in time.
        """
        body = bytearray()
        try:
            async with (
                asyncio.timeout(_METRICS_TIMEOUT_S),
                self._connections.probing.get(f"{self.url}/metrics") as reply,
            ):
                async for piece in reply.content.iter_any():
                    body += piece
                    if len(body) > _MAX_METRICS_BYTES:
                        return None
        except (aiohttp.ClientError, OSError):
            return None
        # Each of several engines behind one server has a line of its own.
        counts = _requests_in(body)
        return sum(map(int, counts)) if counts else None

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
        await self._connections.close()


def _credentials(url: URL, api_key: str | None) -> dict[str, str]:
    if api_key is not None:
        return {"Authorization": f"Bearer {api_key}"}
    if url.user is None:
        return {}
    return {"Authorization": aiohttp.encode_basic_auth(url.user, url.password or "", "utf-8")}


def may_be_sent_twice(method: str, data: Any, *, repeatable: bool) -> bool:
    """Whether a request may be sent once more, where the first one may have reached an engine."""
    return (repeatable or method in _IDEMPOTENT) and isinstance(data, bytes | None)


def _connection_failure(exc: Exception) -> str:
    return f"it takes no connection ({getattr(exc, 'strerror', None) or 'in time'})"
