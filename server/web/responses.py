"""Responses: the headers that all of them have, errors, and the fast response for hits.

Errors are in OpenAI's shape, by vLLM's conventions (`code` is the HTTP status), or in Anthropic's
shape on routes of its API.
"""

from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from types import MappingProxyType
from typing import Self

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from server.config.base import SERVER
from server.protocol.routes import Dialect, route_of
from server.web.request import HttpRequest

RETRY_AFTER_S = 5
_NONE: Mapping[str, str] = MappingProxyType({})
# As Anthropic's documentation lists them; other statuses map by their class.
_ANTHROPICS_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


# Of a long response; the client has to take most of one piece before the next.
_PIECE_BYTES = 256 * 1024


def server_headers(http: HttpRequest) -> dict[str, str]:
    """Return the headers that every response has."""
    own = {"Server": SERVER, "X-Request-Id": http.id}
    return {**own, **http.cors_headers, **http.more_headers}


@lru_cache(2)
def second(at: int) -> tuple[bytes, str]:
    """Return a second (Unix s) as text, and as an HTTP date."""
    return b"%d" % at, formatdate(at, usegmt=True)


def whole_head(
    content_type: str,
    cache_status: str,
    age_s: int,
    etag: str,
    id_: str,
    now: float,
    body_bytes: int,
    more: str = "",
) -> bytes:
    """Return the head of a 200, as it is sent.

    Args:
        content_type, cache_status, age_s, etag: values of headers.
        id_: the request's.
        now: Unix seconds.
        body_bytes: the size of the whole body.
        more: further lines of the head.
    """
    _, date = second(int(now))
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {body_bytes}\r\n"
        f"Cache-Status: {cache_status}\r\nAge: {age_s}\r\nETag: {etag}\r\n"
        f"X-Request-Id: {id_}\r\nServer: {SERVER}\r\nDate: {date}\r\n{more}\r\n"
    ).encode()


def lines_of(headers: Mapping[str, str]) -> str:
    """Return headers as lines of a head."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def more_lines(http: HttpRequest, engine_headers: Mapping[str, str] = _NONE) -> str:
    """Return the lines of a head that only some responses have.

    Args:
        http: the request, whose version and connection decide.
        engine_headers: of the engine's reply.
    """
    lines = ""
    if not http.keep_alive:
        lines = "Connection: close\r\n"
    elif http.version < HttpVersion11:
        lines = "Connection: keep-alive\r\n"
    if http.cors_headers or http.more_headers or engine_headers:
        lines += lines_of({**http.cors_headers, **http.more_headers, **engine_headers})
    return lines


class PrebuiltResponse(web.StreamResponse):
    """A response that is written as it is, with its head.

    aiohttp's `Response` would make a hit take a fifth longer. So this has only the attributes that
    aiohttp uses to finish a response. It is for GET and POST.

    Args:
        http: the request.
        whole: a head, as of `whole_head`, and the body.
    """

    # Not properties, which would be three calls more.
    status = 200
    prepared = True
    keep_alive = True

    def __init__(self, http: HttpRequest, whole: bytes) -> None:
        self._http, self._writer, self._whole = http, http.writer, whole
        self.keep_alive = http.keep_alive

    async def prepare(self, _: web.BaseRequest) -> AbstractStreamWriter:
        return self._writer

    async def write_eof(self, _: bytes = b"") -> None:
        whole, writer = self._whole, self._writer
        while len(whole) > _PIECE_BYTES:
            await self._http.write(writer, whole[:_PIECE_BYTES])
            whole = whole[_PIECE_BYTES:]
        await writer.write_eof(whole)


def close_if_unframed(http: HttpRequest, response: web.StreamResponse) -> None:
    """Have the connection end with a response without length, where HTTP/1.0 knows no other end.

    aiohttp means to, and then forgets it.
    """
    if http.version < HttpVersion11 and response.content_length is None:
        response.force_close()


def error_body(
    status: int,
    message: str,
    *,
    param: str | None = None,
    kind: str | None = None,
    code: str | None = None,
) -> bytes:
    """Return the JSON body of an error; `kind` and `code` are OpenAI's, where it defines them."""
    if kind is None:
        kind = HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")
        kind = kind.removesuffix("Error") + "Error"
    error = {"message": message, "type": kind, "param": param, "code": code or status}
    return orjson.dumps({"error": error})


class ErrorResponse(web.Response):
    """An error of ours."""

    def __init__(self, status: int, message: str, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(status=status, body=body, content_type="application/json", headers=headers)
        self._message = message

    def in_dialect_of(self, path: str) -> Self:
        """Return it in the shape of the API to which `path` belongs."""
        if route_of(path).dialect is Dialect.ANTHROPIC:
            kind = _ANTHROPICS_KINDS.get(self.status)
            if kind is None:
                kind = "invalid_request_error" if self.status < 500 else "api_error"
            error = {"type": kind, "message": self._message}
            self.body = orjson.dumps({"type": "error", "error": error})
        return self


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    kind: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
) -> ErrorResponse:
    """Return an error as a response."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = error_body(status, message, param=param, kind=kind, code=code)
    return ErrorResponse(status, message, body, headers)
