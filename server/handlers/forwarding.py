"""Passing a request through to an engine and its reply back, unchanged and without buffering."""

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from server.engine.routing.upstreams import Upstreams
from server.engine.upstream import UnavailableError
from server.handlers.rendering import failure, unavailable
from server.handlers.upstream_headers import (
    FALLBACK,
    UNBUFFERED,
    forwarded_headers,
    returned_headers,
)
from server.protocol.errors import BadRequestError
from server.protocol.request import ParsedRequest
from server.telemetry.served import Served, attach
from server.web.content_coding import DECODED
from server.web.request import HttpRequest, Reply, SlowClientError
from server.web.responses import close_if_unframed, server_headers

# The end of an answer holds its token counts.
_END_BYTES = 1024
_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Forwarding:
    """How a request is passed to an upstream."""

    model: str = ""
    """By the engine's name, for metrics."""
    body: bytes | None = None
    """The body for the engine, where the request's body has been read already."""
    path: str | None = None
    """Requested instead of the request's own path."""
    headers: Mapping[str, str] | None = None
    """Sent instead of those of the request that engines get."""
    cache_status: str | None = None
    """Added to the reply (RFC 9211)."""
    repeatable: bool = False
    """Whether the request has no other effect than its reply, whatever the method."""
    asked: ParsedRequest | None = None
    """The request, parsed, if it was."""
    kept_id: str | None = None
    """The id of an answer that an upstream keeps, and that the request is about."""
    on_end: Callable[[bytes], None] | None = None
    """Called with the end of an answer, once all of it has been passed on."""
    held_back: Container[int] = ()
    """Statuses of error replies that are returned, but not sent yet."""


async def forward(http: HttpRequest, upstreams: Upstreams, forwarding: Forwarding) -> Reply:
    """Pass `http` to one of the upstreams, and its reply back as it comes."""
    passed = Served("engine", "pass", forwarding.model)
    error = passed._replace(outcome="error")
    response: web.StreamResponse | None = None
    try:
        async with upstreams.request(
            http.method,
            forwarding.path or http.rel_url.raw_path_qs,
            data=_data(http, forwarding),
            headers=_headers(http, forwarding),
            repeatable=forwarding.repeatable,
            asked=forwarding.asked,
            kept_id=forwarding.kept_id,
            # Whatever else is asked for, such as a page or metrics, needs no engine to be started.
            demand="held" if http.method == hdrs.METH_POST else "none",
        ) as reply:
            asked = forwarding.asked
            if asked is not None and asked.cache.fallback is False and FALLBACK in reply.headers:
                raise UnavailableError
            if reply.status in forwarding.held_back:
                return await _held(reply, forwarding.cache_status), error
            response = _answering(http, reply, forwarding.cache_status)
            await response.prepare(http)
            end = await _pass_on(http, upstreams.pieces(reply, _PIECE_BYTES), response)
            if reply.status == 200:
                upstreams.note_counts(reply, end)
                if forwarding.on_end is not None:
                    forwarding.on_end(end)
            return response, passed
    except UnavailableError as exc:
        return unavailable(exc), error
    except (aiohttp.ClientError, OSError) as exc:
        if (mistake := _clients_mistake(http, exc)) is not None:
            attach(mistake, passed)
            raise mistake from exc
        if response is None:
            return failure(exc), passed if http.is_disconnected else error
        # A response that has begun can only be cut, so that the client notices it is incomplete.
        cut = ConnectionResetError()
        attach(cut, passed if http.is_disconnected else error)
        raise cut from exc
    except asyncio.CancelledError as exc:
        attach(exc, passed)
        raise


def _data(http: HttpRequest, forwarding: Forwarding) -> AsyncIterator[bytes] | bytes | None:
    return http.iter_body() if _is_streamed(http, forwarding) else forwarding.body


def _headers(http: HttpRequest, forwarding: Forwarding) -> Mapping[str, str]:
    if forwarding.headers is not None:
        return forwarding.headers
    headers = forwarded_headers(http)
    is_unchanged = _is_streamed(http, forwarding) and http.content_coding not in DECODED
    if is_unchanged and hdrs.CONTENT_LENGTH in http.headers:
        # Some upstreams take no uploads without.
        headers[hdrs.CONTENT_LENGTH] = http.headers[hdrs.CONTENT_LENGTH]
    return headers


def _is_streamed(http: HttpRequest, forwarding: Forwarding) -> bool:
    return forwarding.body is None and http.body_exists


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
        headers["Location"] = _relative_location(URL(location), reply.url)
    response = web.StreamResponse(status=reply.status, headers=headers)
    if reply.content_length is not None and http.method != "HEAD":
        response.content_length = reply.content_length
    close_if_unframed(http, response)
    _set_cache_status(response, cache_status)
    return response


async def _held(reply: aiohttp.ClientResponse, cache_status: str | None) -> web.Response:
    """Return the response that passes on an error, with its body, not yet sent."""
    headers = returned_headers(reply.headers)
    response = web.Response(status=reply.status, body=await reply.read(), headers=headers)
    _set_cache_status(response, cache_status)
    return response


def _set_cache_status(response: web.StreamResponse, cache_status: str | None) -> None:
    if cache_status is not None:
        # Caches nearer to the engine stand first.
        theirs = response.headers.get("Cache-Status")
        response.headers["Cache-Status"] = f"{theirs}, {cache_status}" if theirs else cache_status


async def _pass_on(
    http: HttpRequest, pieces: AsyncIterator[bytes], response: web.StreamResponse
) -> bytes:
    """Pass a reply's body on, and return its end."""
    end = b""
    async for piece in pieces:
        await http.write(response, piece)
        end = piece if len(piece) >= _END_BYTES else (end + piece)[-_END_BYTES:]
    await response.write_eof()
    return end


def _clients_mistake(http: HttpRequest, exc: BaseException) -> Exception | None:
    """Return the client's mistake, if one was found while its body was passed on."""
    if isinstance(exc.__cause__, BadRequestError | SlowClientError):
        return exc.__cause__
    unread = http.content.exception()
    return unread if isinstance(unread, web.RequestPayloadError) else None


def _relative_location(location: URL, engine: URL) -> str:
    """Return where a redirect leads, without the engine's address, which stays private."""
    if location.is_absolute() and location.origin() == engine.origin():
        return location.raw_path_qs
    return str(location)
