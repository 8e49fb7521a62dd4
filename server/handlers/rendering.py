"""Answers as clients get them."""

import time

from aiohttp import hdrs, web

from server.engine.upstream import UnavailableError
from server.handlers.errors import failure, unavailable
from server.handlers.recording import NotAnAnswerError
from server.handlers.upstream_headers import (
    UNBUFFERED,
    returned_headers,
)
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


_TYPED = b'{"type":"error"'


async def _render(
    http: HttpRequest, request: ParsedRequest, answer: Answer, status: str, age_s: int = 0
) -> web.StreamResponse:
    """Return a finished answer in the form that was asked for."""
    with step("render"):
        if answer.encoding != request.encoding:
            answer = await offload(len(answer.content), convert.convert, answer, request.encoding)
        etag = template.etag(answer, wants_usage=request.wants_usage)
        if hdrs.IF_NONE_MATCH in http.headers and _is_there(http, etag):
            # By RFC 9110 it would be 412, as of a POST that changes something; this is a query.
            headers = {"Cache-Status": status, "Age": str(age_s), "ETag": etag}
            return web.Response(status=304, headers=headers)
        id_, created = _fresh(http, request)
        body = template.render(
            answer, id_, created, wants_usage=request.wants_usage, done=request.route.format.done
        )
    content_type = _SSE if answer.encoding == Encoding.SSE else _JSON
    return PrebuiltResponse(http, content_type, status, age_s, etag, body)


def _is_there(http: HttpRequest, etag: str) -> bool:
    """Whether the client has this answer already (RFC 9110, section 13.1.2)."""
    has = ", ".join(http.headers.getall(hdrs.IF_NONE_MATCH))
    return has.strip() == "*" or etag.removeprefix("W/") in has


async def _begin(http: HttpRequest, status: str, age_s: int) -> web.StreamResponse:
    headers = {"Cache-Status": status, "Age": str(age_s), "Content-Type": _SSE}
    response = web.StreamResponse(headers=headers | UNBUFFERED | server_headers(http))
    await response.prepare(http)
    return response


def _not_cached() -> web.Response:
    response = error_response(504, "No tier has this answer, and only-if-cached asks for no other.")
    response.headers["Cache-Status"] = "tierserve; detail=only-if-cached"
    return response


def _fresh(http: HttpRequest, request: ParsedRequest) -> tuple[bytes, int]:
    """Return the `id` and `created` of an answer given now."""
    return (request.route.id_prefix + http.id).encode(), int(time.time())


def _failed(exc: Exception) -> web.Response:
    if isinstance(exc, NotAnAnswerError):
        return web.Response(status=exc.status, body=exc.body, headers=returned_headers(exc.headers))
    return unavailable(exc) if isinstance(exc, UnavailableError) else failure(exc)


async def _cut(
    response: web.StreamResponse, failed: web.Response, request: ParsedRequest
) -> web.StreamResponse:
    """End a stream that has begun: an error event, and no `[DONE]`.

    Where events have names it has, too, and its data has the type that it would have of vLLM.
    """
    named = not request.route.format.done
    if isinstance(failed, ErrorResponse):
        failed.in_dialect_of(request.path)
    if isinstance(failed.body, bytes):
        data = failed.body.replace(b"\n", b" ")
        if named and not data.startswith(_TYPED):
            data = data.replace(b"{", _TYPED + b",", 1)
        await response.write(b"event: error\n" * named + b"data: " + data + b"\n\n")
    await response.write_eof()
    return response
