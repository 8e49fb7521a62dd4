"""Passing a request through to an engine and its reply back, unchanged and without buffering."""

from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from server.engine.upstream import UnavailableError, Upstreams
from server.handlers.errors import failure, unavailable
from server.handlers.upstream_headers import UNBUFFERED, forwarded_headers, returned_headers
from server.protocol.errors import BadRequestError
from server.web.content_coding import DECODED
from server.web.request import HttpRequest, SlowClientError
from server.web.responses import server_headers

# Token counts are there.
_END_BYTES = 1024


async def forward(
    http: HttpRequest,
    upstreams: Upstreams,
    *,
    body: bytes | None = None,
    path: str | None = None,
    headers: Mapping[str, str] | None = None,
    cache_status: str | None = None,
    repeatable: bool = False,
    ended: Callable[[bytes], None] | None = None,
) -> web.StreamResponse:
    """Pass `http` to an upstream.

    Args:
        http: the client's request.
        upstreams: one of them is asked.
        body: the request's body where it has been read already, as an engine may be sent it.
        path: asked instead of the request's own.
        headers: with which it is asked, instead of those of the request that are an engine's.
        cache_status: added to the reply (RFC 9211).
        repeatable: whether nothing but the reply comes of it, whatever the method.
        ended: is told the end of an answer, once all of it has been passed on.
    """
    http.outcome = ("engine", "pass")
    headers = forwarded_headers(http) if headers is None else headers
    data: AsyncIterator[bytes] | bytes | None = body
    if body is None and http.body_exists:
        data = http.iter_body()
        if http.content_coding not in DECODED and hdrs.CONTENT_LENGTH in http.headers:
            # Some upstreams take no uploads without.
            headers = CIMultiDict(headers)
            headers[hdrs.CONTENT_LENGTH] = http.headers[hdrs.CONTENT_LENGTH]
    response: web.StreamResponse | None = None
    try:
        async with upstreams.request(
            http.method,
            path or http.rel_url.raw_path_qs,
            data=data,
            headers=headers,
            repeatable=repeatable,
        ) as reply:
            response = _answering(http, reply, cache_status)
            await response.prepare(http)
            end = await _pass_on(http, reply, response)
            if ended is not None and reply.status == 200:
                ended(end)
            return response
    except UnavailableError as exc:
        http.outcome = ("engine", "error")
        return unavailable(exc)
    except (aiohttp.ClientError, OSError) as exc:
        if (unread := _unread(http, exc)) is not None:
            raise unread from exc
        if not http.is_disconnected:
            http.outcome = ("engine", "error")
        if response is not None:
            # What has begun can only be cut, so that the client sees that it isn't whole.
            raise ConnectionResetError from exc
        return failure(exc)


def _answering(
    http: HttpRequest, reply: aiohttp.ClientResponse, cache_status: str | None
) -> web.StreamResponse:
    """Return the response that passes a reply on, without its body."""
    headers = returned_headers(reply.headers)
    if reply.content_type == "text/event-stream":
        headers.update(UNBUFFERED)
    varies = headers.popall("Vary", [])
    headers.update(server_headers(http))
    headers.extend(("Vary", value) for value in varies)
    if location := headers.get("Location"):
        headers["Location"] = _seen_from_here(URL(location), reply.url)
    response = web.StreamResponse(status=reply.status, headers=headers)
    if reply.content_length is not None and http.method != "HEAD":
        response.content_length = reply.content_length
    if cache_status is not None:
        # Caches nearer to the engine stand first.
        theirs = reply.headers.get("Cache-Status")
        response.headers["Cache-Status"] = f"{theirs}, {cache_status}" if theirs else cache_status
    return response


async def _pass_on(
    http: HttpRequest, reply: aiohttp.ClientResponse, response: web.StreamResponse
) -> bytes:
    """Pass a reply's body on, and return its end."""
    end = b""
    async for piece in reply.content.iter_any():
        await http.write(response, piece)
        end = piece if len(piece) >= _END_BYTES else (end + piece)[-_END_BYTES:]
    await response.write_eof()
    return end


def _unread(http: HttpRequest, exc: BaseException) -> Exception | None:
    """Return the client's mistake, if that was met while its body was passed on."""
    if isinstance(exc.__cause__, BadRequestError | SlowClientError):
        return exc.__cause__
    unread = http.content.exception()
    return unread if isinstance(unread, web.RequestPayloadError) else None


def _seen_from_here(location: URL, engine: URL) -> str:
    """Return where a redirect leads, without the engine's address, which is nobody's business."""
    if location.is_absolute() and location.origin() == engine.origin():
        return location.raw_path_qs
    return str(location)
