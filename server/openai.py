"""The road of a request that may be cached: parse, lookup, single flight, engine, store, render."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import floor

import aiohttp
from aiohttp import web

from server import convert
from server.passthrough import forward, forwarded, returned
from server.record import NotAnAnswerError, record
from server.request import BadRequestError, Request, parse
from server.responses import Whole, error_response, failure, own_headers, unavailable
from server.upstream import UnavailableError, Upstreams
from tiers import Answer, Chain, Flight, Flights, Form, Freshness, Hit, State
from tiers.flight import Listener

_JSON = "application/json"
_SSE = "text/event-stream; charset=utf-8"
_DONE = b"data: [DONE]\n\n"
_ID_PREFIX = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
ROUTES = tuple(_ID_PREFIX)
# Of an engine that can't answer, as opposed to one that won't (RFC 5861, section 4).
_NO_ANSWER = frozenset({500, 502, 503, 504})
# Above, those who wait for an answer need the engine more.
_REFRESH_BELOW = 32


class OpenAI:
    """The handler of the routes whose answers are kept.

    Args:
        chain: where answers are kept.
        flights: the generations under way.
        upstreams: asked on a miss.
        identity: what gives the answers, as `server.identity` says it.
        model: the model that a body without one means.
        freshness: tells how long the answers of a route and a model are good for.
        cache_all: whether requests that ask for chance are cached too.
    """

    def __init__(
        self,
        *,
        chain: Chain,
        flights: Flights,
        upstreams: Upstreams,
        identity: str,
        model: str,
        freshness: Callable[[str, str], Freshness],
        cache_all: bool,
    ) -> None:
        self._chain, self._flights, self._upstreams = chain, flights, upstreams
        self._identity, self._model, self._freshness = identity, model, freshness
        self._cache_all = cache_all

    async def answer(self, http: web.Request) -> web.StreamResponse:
        """Answer from a tier, from a running flight, or from the engine."""
        raw = await http.read()
        try:
            scope = http.headers.get("Authorization", "")
            request = parse(http.path, raw, scope, self._identity, self._model)
        except BadRequestError as exc:
            return error_response(400, str(exc))
        if not (request.deterministic or self._cache_all):
            status = "tierserve; fwd=bypass"
            return await forward(http, self._upstreams, body=raw, cache_status=status)
        hit = await self._chain.lookup(request.key)
        if hit is not None and hit.state is not State.FALLBACK:
            if hit.refresh:
                self._refresh(http, request)
            http["outcome"] = (hit.tier, "hit" if hit.state is State.FRESH else "stale")
            return self._render_hit(http, request, hit, "hit")
        produce = partial(self._produce, request, forwarded(http))
        listener, collapsed = self._flights.join(request.key, request.form, produce)
        http["outcome"] = ("engine", "collapsed" if collapsed else "miss")
        status = f"tierserve; fwd={'stale' if hit else 'miss'}{'; collapsed' if collapsed else ''}"
        async with listener:
            response = await self._listen(http, request, listener, status)
        if hit is None or response.prepared or response.status not in _NO_ANSWER:
            return response
        http["outcome"] = (hit.tier, "stale")
        return self._render_hit(http, request, hit, f"fwd=stale; fwd-status={response.status}")

    def _refresh(self, http: web.Request, request: Request) -> None:
        """Have a new answer made in the background, in place of the one that is given out now."""
        if self._upstreams.ready and len(self._flights) < _REFRESH_BELOW:
            produce = partial(self._produce, request, forwarded(http))
            self._flights.launch(request.key, request.form, produce)

    def _render_hit(
        self, http: web.Request, request: Request, hit: Hit, how: str
    ) -> web.StreamResponse:
        now, entry = self._chain.clock(), hit.entry
        ttl, age = floor(entry.expires_at - now), max(0, int(now - entry.stored_at))
        headers = {
            "Cache-Status": f"tierserve; {how}; ttl={ttl}; detail={hit.tier}",
            "Age": str(age),
        }
        return _render(http, request, entry.answer, headers)

    async def _listen(
        self, http: web.Request, request: Request, listener: Listener, status: str
    ) -> web.StreamResponse:
        flight = listener.flight
        headers = {"Cache-Status": status, "Age": "0"}
        response: web.StreamResponse | None = None
        id_, created = _fresh(http)
        try:
            if request.form is Form.EVENTS and flight.form is Form.EVENTS:
                async for event in listener:
                    if response is None:
                        response = web.StreamResponse(headers=headers | own_headers(http))
                        response.headers["Content-Type"] = _SSE
                        await response.prepare(http)
                    await response.write(convert.fill(event, id_, created))
            else:
                async for _ in listener:
                    pass
        except (NotAnAnswerError, UnavailableError, aiohttp.ClientError, OSError) as exc:
            if http.transport is None:
                # Not the flight has failed: this client has gone.
                raise ConnectionResetError from exc
            http["outcome"] = ("engine", "error")
            failed = _failed(exc)
            if response is not None:
                return await _cut(response, failed)
            failed.headers["Cache-Status"] = status
            return failed
        answer = flight.answer
        if answer is None:
            raise AssertionError("a flight that ends without an error has an answer")
        if response is None:
            return _render(http, request, answer, headers)
        tail = convert.fill(answer.usage, id_, created) if request.wants_usage else b""
        await response.write(tail + _DONE)
        await response.write_eof()
        return response

    async def _produce(self, request: Request, headers: Mapping[str, str], flight: Flight) -> None:
        """Have an engine answer, publish what it says, and store a finished answer."""
        started = time.monotonic()
        async with self._upstreams.request(
            "POST", request.route, data=request.body, headers=headers
        ) as reply:
            answer, finished = await record(reply, request.form, flight.publish)
        flight.end(answer)
        if finished:
            freshness = self._freshness(request.route, request.model)
            took_s = time.monotonic() - started
            await self._chain.store(request.key, answer, freshness, took_s=took_s)


def _render(
    http: web.Request, request: Request, answer: Answer, headers: dict[str, str]
) -> web.StreamResponse:
    """Return a finished answer in the form that was asked for."""
    id_, created = _fresh(http)
    if request.form is Form.BODY:
        content, headers["Content-Type"] = convert.as_body(answer), _JSON
    else:
        answer = convert.as_events(answer)
        usage = answer.usage if request.wants_usage else b""
        content, headers["Content-Type"] = answer.content + usage + _DONE, _SSE
    return Whole(http, headers, convert.fill(content, id_, created))


def _fresh(http: web.Request) -> tuple[bytes, int]:
    """Return the `id` and `created` of an answer given now."""
    return (_ID_PREFIX[http.path] + http["id"]).encode(), int(time.time())


def _failed(exc: Exception) -> web.Response:
    if isinstance(exc, NotAnAnswerError):
        return web.Response(status=exc.status, body=exc.body, headers=returned(exc.headers))
    return unavailable() if isinstance(exc, UnavailableError) else failure(exc)


async def _cut(response: web.StreamResponse, failed: web.Response) -> web.StreamResponse:
    """End a stream that has begun: an error event, and no `[DONE]`."""
    if isinstance(failed.body, bytes):
        await response.write(b"data: " + failed.body.replace(b"\n", b" ") + b"\n\n")
    await response.write_eof()
    return response
