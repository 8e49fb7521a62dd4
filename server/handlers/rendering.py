"""Rendering: answers and failures as responses to a client."""

import time
from collections.abc import Mapping
from types import MappingProxyType

from aiohttp import hdrs, web

from server.engine.upstream import UnavailableError
from server.handlers.errors import failure, unavailable
from server.handlers.recording import NotAnAnswerError
from server.handlers.upstream_headers import UNBUFFERED, returned_headers
from server.protocol import convert, template
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest
from server.telemetry.spans import step
from server.web.offload import offload
from server.web.request import HttpRequest
from server.web.responses import ErrorResponse, PrebuiltResponse, error_response, server_headers
from tiers import Answer

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
    content_type = _SSE if answer.encoding == Encoding.SSE else _JSON
    return PrebuiltResponse(http, content_type, cache_status, age_s, etag, body, engine_headers)


def fresh_marks(http: HttpRequest, request: ParsedRequest) -> tuple[bytes, int]:
    """Return the `id` and `created` of an answer that is sent now."""
    return (request.route.id_prefix + http.id).encode(), int(time.time())


async def begin_stream(http: HttpRequest, cache_status: str, age_s: int) -> web.StreamResponse:
    """Send the head of a stream of events."""
    headers = {"Cache-Status": cache_status, "Age": str(age_s), "Content-Type": _SSE}
    response = web.StreamResponse(headers=headers | UNBUFFERED | server_headers(http))
    await response.prepare(http)
    return response


async def abort_stream(
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


def failed_generation(exc: Exception) -> web.Response:
    """Return the response to a request whose generation has failed with `exc`."""
    if isinstance(exc, NotAnAnswerError):
        return web.Response(status=exc.status, body=exc.body, headers=returned_headers(exc.headers))
    return unavailable(exc) if isinstance(exc, UnavailableError) else failure(exc)
