"""The road of a request that may be cached: parse, lookup, single flight, engine, store, render."""

import time
from contextlib import suppress
from functools import partial

import aiohttp
import orjson
from aiohttp import web

from server import convert
from server.errors import error_body, error_response
from server.request import BadRequestError, Request, parse
from server.upstream import UnavailableError, Upstreams
from tiers import Answer, Chain, Entry, Flight, Flights, Form
from tiers.flight import Listener

RETRY_AFTER_S = 5
_JSON = "application/json"
_SSE = "text/event-stream; charset=utf-8"
_CUT_SHORT = "The engine ended before its answer was complete."
_DONE = b"data: [DONE]\n\n"
_ID_PREFIX = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
ROUTES = tuple(_ID_PREFIX)
_HOP_BY_HOP = frozenset(
    {
        "connection", "content-length", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "x-request-id",
        "expect",
    }
)  # fmt: skip


class NotAnAnswerError(Exception):
    """The engine's reply is an error; it is passed on as it came, and never stored."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(status)
        self.status, self.content_type, self.body = status, content_type, body


class OpenAI:
    """Handlers for the routes whose answers are kept, and for all that pass through."""

    def __init__(
        self,
        *,
        chain: Chain,
        flights: Flights,
        upstreams: Upstreams,
        identity: str,
        model: str,
        cache_all: bool,
    ) -> None:
        self._chain, self._flights, self._upstreams = chain, flights, upstreams
        self._identity, self._model = identity, model
        self._cache_all = cache_all

    async def answer(self, http: web.Request) -> web.StreamResponse:
        """Answer from a tier, from a running flight, or from the engine."""
        raw = await http.read()
        try:
            request = parse(
                http.path,
                raw,
                scope=http.headers.get("Authorization", ""),
                identity=self._identity,
                default_model=self._model,
            )
        except BadRequestError as exc:
            return error_response(400, str(exc))
        if not (request.deterministic or self._cache_all):
            return await self.forward(http, body=raw)
        hit = await self._chain.lookup(request.key)
        if hit is not None:
            http["outcome"] = (hit.tier, "hit")
            return self._render(http, request, hit.entry, hit.tier)
        produce = partial(self._produce, request, _forwarded(http))
        listener, collapsed = self._flights.join(request.key, request.form, produce)
        http["outcome"] = ("engine", "collapsed" if collapsed else "miss")
        async with listener:
            return await self._listen(http, request, listener, collapsed=collapsed)

    async def forward(
        self, http: web.Request, *, body: bytes | None = None, path: str | None = None
    ) -> web.StreamResponse:
        """Pass a request through to an engine, and its reply back, without buffering."""
        http["outcome"] = ("engine", "pass")
        try:
            upstream = self._upstreams.pick()
        except UnavailableError:
            return unavailable()
        data = body if body is not None else (http.content if http.body_exists else None)
        url = upstream.url + (path or http.raw_path)
        try:
            async with upstream.session.request(
                http.method, url, data=data, headers=_forwarded(http), allow_redirects=False
            ) as reply:
                response = web.StreamResponse(status=reply.status)
                for name, value in reply.headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        response.headers.add(name, value)
                if reply.content_length is not None and http.method != "HEAD":
                    response.content_length = reply.content_length
                if body is not None:
                    response.headers["Cache-Status"] = "tierserve; fwd=bypass"
                response.headers["X-Request-Id"] = http["id"]
                await response.prepare(http)
                async for piece in reply.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            upstream.ready = False
            return unavailable()

    def _render(self, http: web.Request, request: Request, entry: Entry, tier: str) -> web.Response:
        now = self._chain.clock()
        headers = {
            "Cache-Status": f"tierserve; hit; ttl={int(entry.expires_at - now)}; detail={tier}",
            "Age": str(max(0, int(now - entry.stored_at))),
            "X-Request-Id": http["id"],
        }
        id_, created = _fresh(http)
        if request.form is Form.BODY:
            answer = entry.answer
            body = answer.render(convert.as_body(answer), id_, created)
            return web.Response(body=body, headers={"Content-Type": _JSON, **headers})
        answer = convert.as_events(entry.answer)
        parts = answer.content + (answer.usage if request.wants_usage else b"")
        body = answer.render(parts, id_, created) + _DONE
        return web.Response(body=body, headers={"Content-Type": _SSE, **headers})

    async def _listen(
        self, http: web.Request, request: Request, listener: Listener, *, collapsed: bool
    ) -> web.StreamResponse:
        flight = listener.flight
        status = "tierserve; fwd=miss" + ("; collapsed" if collapsed else "")
        headers = {"Cache-Status": status, "Age": "0", "X-Request-Id": http["id"]}
        response = web.StreamResponse(headers={"Content-Type": _SSE, **headers})
        id_, created = _fresh(http)
        render = Answer(Form.EVENTS, b"").render
        try:
            if request.form is Form.EVENTS and flight.form is Form.EVENTS:
                async for item in listener:
                    if not response.prepared:
                        await response.prepare(http)
                    await response.write(render(item, id_, created))
            else:
                async for _ in listener:
                    pass
            answer = flight.answer
            if answer is None:
                raise ConnectionAbortedError("the engine's answer ended too early")
        except (NotAnAnswerError, UnavailableError, aiohttp.ClientError, OSError) as exc:
            if response.prepared:
                return await _cut(response)
            return _failure(exc, http)
        if request.form is Form.BODY:
            body = answer.render(convert.as_body(answer), id_, created)
            return web.Response(body=body, headers={"Content-Type": _JSON, **headers})
        if flight.form is Form.BODY:
            answer = convert.as_events(answer)
            await response.prepare(http)
            await response.write(answer.render(answer.content, id_, created))
        tail = answer.render(answer.usage, id_, created) if request.wants_usage else b""
        await response.write(tail + _DONE)
        await response.write_eof()
        return response

    async def _produce(self, request: Request, headers: dict[str, str], flight: Flight) -> None:
        """Have the engine answer, publish what it says, and store a finished answer."""
        upstream = self._upstreams.pick()
        try:
            async with upstream.session.post(
                upstream.url + request.route, data=request.body, headers=headers
            ) as reply:
                if reply.status != 200:
                    body = await reply.read()
                    raise NotAnAnswerError(reply.status, reply.content_type, body)
                if request.form is Form.BODY:
                    answer, finished = await _record_body(reply, flight)
                else:
                    answer, finished = await _record_events(reply, flight)
        except aiohttp.ClientConnectorError as exc:
            upstream.ready = False
            raise UnavailableError from exc
        flight.end(answer)
        if finished:
            await self._chain.store(request.key, answer)


def unavailable() -> web.Response:
    """Return what a miss gets while no engine answers."""
    return error_response(
        503, "The engine is starting or down; try again.", retry_after_s=RETRY_AFTER_S
    )


async def _record_body(reply: aiohttp.ClientResponse, flight: Flight) -> tuple[Answer, bool]:
    raw = await reply.read()
    try:
        parsed = orjson.loads(raw)
        finished = convert.is_finished(parsed["choices"])
        answer = Answer(Form.BODY, convert.template(parsed))
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
        raise NotAnAnswerError(reply.status, reply.content_type, raw) from exc
    await flight.publish(answer.content)
    return answer, finished


async def _record_events(reply: aiohttp.ClientResponse, flight: Flight) -> tuple[Answer, bool]:
    events: list[bytes] = []
    usage, rest, done, whole = b"", b"", False, True
    reasons: dict[int, object] = {}
    async for piece in reply.content.iter_any():
        *parts, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for part in parts:
            data = part.removeprefix(b"data:").strip()
            if not part.startswith(b"data:") or done:
                continue
            if data == b"[DONE]":
                done = True
                continue
            chunk = orjson.loads(data)
            made = convert.event(chunk)
            choices = chunk.get("choices")
            if choices == [] and chunk.get("usage"):
                usage = made
                continue
            whole = whole and isinstance(choices, list)
            for choice in choices or ():
                reasons[choice["index"]] = choice.get("finish_reason") or reasons.get(
                    choice["index"]
                )
            events.append(made)
            await flight.publish(made)
    if not done:
        raise ConnectionAbortedError("the engine's stream was cut")
    ended = [{"finish_reason": reason} for reason in reasons.values()]
    answer = Answer(Form.EVENTS, b"".join(events), usage)
    return answer, whole and convert.is_finished(ended)


def _failure(exc: Exception, http: web.Request) -> web.Response:
    http["outcome"] = ("engine", "error")
    if isinstance(exc, NotAnAnswerError):
        return web.Response(status=exc.status, body=exc.body, content_type=exc.content_type)
    if isinstance(exc, UnavailableError):
        return unavailable()
    return error_response(502, _CUT_SHORT)


async def _cut(response: web.StreamResponse) -> web.StreamResponse:
    """End a stream that has begun: an error event, and no `[DONE]`."""
    body = error_body(502, _CUT_SHORT)
    with suppress(ConnectionError):
        await response.write(b"data: " + body + b"\n\n")
        await response.write_eof()
    return response


def _forwarded(http: web.Request) -> dict[str, str]:
    headers = {k: v for k, v in http.headers.items() if k.lower() not in _HOP_BY_HOP}
    return headers | {"X-Request-Id": http["id"]}


def _fresh(http: web.Request) -> tuple[bytes, int]:
    """Return the `id` and `created` of an answer given now."""
    return (_ID_PREFIX[http.path] + http["id"]).encode(), int(time.time())
