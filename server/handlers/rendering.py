"""Rendering: answers, whole or while they are generated, and failures as responses to a client."""

import time
from collections.abc import Mapping
from types import MappingProxyType

import aiohttp
from aiohttp import hdrs, web

from server.engine.upstream import UnavailableError
from server.handlers.recording import NotAnAnswerError
from server.handlers.upstream_headers import (
    FALLBACK,
    LOAD,
    LOAD_FORMAT,
    UNBUFFERED,
    fallback_headers,
    returned_headers,
)
from server.protocol import convert, template
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest
from server.telemetry.served import Served, attach
from server.telemetry.spans import step
from server.web.offload import offload
from server.web.request import HttpRequest, Reply
from server.web.responses import (
    RETRY_AFTER_S,
    ErrorResponse,
    PrebuiltResponse,
    close_if_unframed,
    error_response,
    more_lines,
    server_headers,
    whole_head,
)
from tiers import Answer, Flight
from tiers.answer_cache import Pending
from tiers.prefix_kv.options import DISK_TOKENS

_ENGINE = "engine"
_WRITTEN_BYTES = 32 * 1024
_JSON = "application/json"
_SSE = "text/event-stream; charset=utf-8"
_TYPED_ERROR = b'{"type":"error"'
_NONE: Mapping[str, str] = MappingProxyType({})


async def render(
    http: HttpRequest,
    request: ParsedRequest,
    answer: Answer,
    cache_status: str,
    age_s: int = 0,
    engine_headers: Mapping[str, str] = _NONE,
) -> web.StreamResponse:
    """Return the response with a finished answer, in the encoding that the client asked for.

    Raises:
        NotConvertibleError: the answer has another encoding, and can't be converted.
    """
    with step("render"):
        if answer.encoding != request.encoding:
            answer = await offload(len(answer.content), convert.convert, answer, request.encoding)
        etag = template.etag(answer, wants_usage=request.wants_usage)
        if hdrs.IF_NONE_MATCH in http.headers and http.has_etag(etag):
            # RFC 9110 asks for 412 where a POST changes something; this POST is a query.
            headers = {"Cache-Status": cache_status, "Age": str(age_s), "ETag": etag}
            return web.Response(status=304, headers={**headers, **engine_headers})
        id_, created = fresh_marks(http, request)
        body = template.render(
            answer, id_, created, wants_usage=request.wants_usage, done=request.route.format.done
        )
    head = whole_head(
        content_type_of(answer.encoding),
        cache_status,
        age_s,
        etag,
        http.id,
        time.time(),
        len(body),
        more_lines(http, engine_headers),
    )
    return PrebuiltResponse(http, head + body)


def content_type_of(encoding: int) -> str:
    """Return the `Content-Type` of answers in an encoding."""
    return _SSE if encoding == Encoding.SSE else _JSON


def fresh_marks(http: HttpRequest, request: ParsedRequest) -> tuple[bytes, int]:
    """Return the `id` and `created` of an answer that is sent now."""
    return (request.route.id_prefix + http.id).encode(), int(time.time())


async def _begin_stream(
    http: HttpRequest, request: ParsedRequest, pending: Pending
) -> web.StreamResponse:
    """Send the head of a stream of events."""
    flight = pending.subscriber.flight
    _tell_fallback(http, request, flight)
    status, age = cache_status_of(pending), str(int(flight.age_s))
    headers = {"Cache-Status": status, "Age": age, "Content-Type": _SSE}
    response = web.StreamResponse(headers=headers | UNBUFFERED | server_headers(http))
    close_if_unframed(http, response)
    await response.prepare(http)
    return response


async def _abort_stream(
    response: web.StreamResponse, failed: web.Response, request: ParsedRequest
) -> web.StreamResponse:
    """End a stream that has begun by an error event, without `[DONE]`.

    Where events have names, this one is named `error`, and its data has vLLM's type.
    """
    is_named = not request.route.format.done
    if isinstance(failed, ErrorResponse):
        failed.in_dialect_of(request.path)
    if isinstance(failed.body, bytes):
        data = failed.body.replace(b"\n", b" ")
        if is_named and not data.startswith(_TYPED_ERROR):
            data = data.replace(b"{", _TYPED_ERROR + b",", 1)
        await response.write(b"event: error\n" * is_named + b"data: " + data + b"\n\n")
    await response.write_eof()
    return response


def not_cached() -> web.Response:
    """Return the response to a request that accepts only what a tier holds, and none holds it."""
    response = error_response(504, "No tier has this answer, and only-if-cached asks for no other.")
    response.headers["Cache-Status"] = "tierserve; detail=only-if-cached"
    return response


async def relay_whole(http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
    """Wait for the whole answer."""
    flight = pending.subscriber.flight
    async for _ in pending.subscriber:
        pass
    _tell_fallback(http, request, flight)
    # A hit has no such header: the engine isn't involved, so its load isn't known.
    load = flight.notes.get(http.headers.get(LOAD_FORMAT, ""))
    response = await render(
        http,
        request,
        _answer_of(flight),
        cache_status_of(pending),
        int(flight.age_s),
        {} if load is None else {LOAD: load},
    )
    return response, generated(request, pending)


async def relay_stream(http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
    """Pass events on as they are generated.

    The stream begins when the engine's does, which may be long before its first event. Where a
    stale answer could be given instead it begins with that event, since then it no longer can.
    """
    flight = pending.subscriber.flight
    id_, created = fresh_marks(http, request)
    wants_usage = request.wants_usage
    response: web.StreamResponse | None = None
    try:
        async for event in pending.subscriber:
            # All that have come are one write: one each would keep the loop where many have.
            item = b"".join(
                template.render_item(each, id_, created, wants_usage=wants_usage)
                for each in (event, *pending.subscriber.take_ready(_WRITTEN_BYTES))
            )
            if pending.stale is not None and not item:
                continue
            if response is None:
                response = await _begin_stream(http, request, pending)
            if item:
                await http.write(response, item)
    except (NotAnAnswerError, aiohttp.ClientError, OSError) as exc:
        if response is None or http.is_disconnected:
            raise
        error = Served(_ENGINE, "error", request.model)
        try:
            return await _abort_stream(response, failed_generation(exc), request), error
        except BaseException as gone:
            attach(gone, error)
            raise
    if response is None:
        response = await _begin_stream(http, request, pending)
    usage = _answer_of(flight).trailer if wants_usage else b""
    end = template.fill_marks(usage, id_, created) + request.route.format.done
    await http.write(response, end)
    await response.write_eof()
    return response, generated(request, pending)


def _tell_fallback(http: HttpRequest, request: ParsedRequest, flight: Flight) -> None:
    """Tell the client if another model has answered at an upstream that is a tierserve.

    Raises:
        UnavailableError: the client refuses that.
    """
    if (model := flight.notes.get(FALLBACK)) is not None:
        if request.cache.fallback is False:
            raise UnavailableError
        http.more_headers = {**http.more_headers, **fallback_headers(model)}


def cache_status_of(pending: Pending) -> str:
    """Return the `Cache-Status` of a generated answer (RFC 9211)."""
    status = f"tierserve; fwd={pending.reason}{'; collapsed' if pending.collapsed else ''}"
    if (tokens := pending.subscriber.flight.notes.get(DISK_TOKENS)) is not None:
        status += f'; detail="{tokens} prompt tokens from disk"'
    return status


def generated(request: ParsedRequest, pending: Pending) -> Served:
    """Return the record of a generated answer, even an incomplete one."""
    outcome = "collapsed" if pending.collapsed else "miss"
    flight = pending.subscriber.flight
    answer = flight.answer if flight.kept else None
    return Served(_ENGINE, outcome, request.model, request.key, answer)


def _answer_of(flight: Flight) -> Answer:
    if flight.answer is None:
        raise AssertionError("a flight that ends without an error has an answer")
    return flight.answer


def failed_generation(exc: Exception) -> web.Response:
    """Return the response to a request whose generation has failed with `exc`."""
    if isinstance(exc, NotAnAnswerError):
        return web.Response(status=exc.status, body=exc.body, headers=returned_headers(exc.headers))
    return unavailable(exc) if isinstance(exc, UnavailableError) else failure(exc)


def failure(exc: Exception) -> ErrorResponse:
    """Return the response where the engine failed with `exc`."""
    if isinstance(exc, TimeoutError):
        return error_response(504, "The engine did not answer in time.")
    return error_response(502, "The engine ended before its answer was complete.")


def unavailable(exc: UnavailableError) -> ErrorResponse:
    """Return the response where no engine takes the request."""
    return error_response(503, str(exc), retry_after_s=RETRY_AFTER_S)
