"""Responses: the headers that all of them have, errors, and the fast response for hits.

Errors are in OpenAI's shape, by vLLM's conventions (`code` is the HTTP status), or in Anthropic's
shape on routes of its API.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Self

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

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


def server_headers(http: HttpRequest) -> dict[str, str]:
    """Return the headers that every response has."""
    return {"Server": SERVER, "X-Request-Id": http.id, **http.response_headers}


class PrebuiltResponse(web.StreamResponse):
    """A 200 with all of its body, written in one piece with its head.

    aiohttp's `Response` would make a hit take a fifth longer. So this has only the attributes that
    aiohttp uses to finish a response. It is for GET and POST, and includes `server_headers`.

    Args:
        http: the request.
        content_type, cache_status, age_s, etag: values of headers.
        body: all of it.
        engine_headers: of the engine's reply.
    """

    # Not properties, which would be two calls more.
    status = 200
    prepared = True

    def __init__(
        self,
        http: HttpRequest,
        content_type: str,
        cache_status: str,
        age_s: int,
        etag: str,
        body: bytes,
        engine_headers: Mapping[str, str] = _NONE,
    ) -> None:
        self._writer = http.writer
        self._keeps_alive = http.keep_alive
        end = ""
        if not self._keeps_alive:
            end = "Connection: close\r\n"
        elif http.version < HttpVersion11:
            end = "Connection: keep-alive\r\n"
        if http.response_headers or engine_headers:
            more = {**http.response_headers, **engine_headers}
            end += "".join([f"{name}: {value}\r\n" for name, value in more.items()])
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"Cache-Status: {cache_status}\r\nAge: {age_s}\r\nETag: {etag}\r\n"
            f"X-Request-Id: {http.id}\r\n"
            f"Server: {SERVER}\r\nDate: {rfc822_formatted_time()}\r\n{end}\r\n"
        )
        self._whole = head.encode() + body

    @property
    def keep_alive(self) -> bool:
        return self._keeps_alive

    async def prepare(self, _: web.BaseRequest) -> AbstractStreamWriter:
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        await self._writer.write_eof(self._whole + data)


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
