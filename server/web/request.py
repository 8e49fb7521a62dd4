"""An HTTP request: aiohttp's, with its id, its tenant, and the errors of reading its body."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import reify
from multidict import istr

from server.auth.limits import RateLimiter
from server.auth.tenant import NOBODY, Tenant
from server.process import Draining
from server.telemetry.served import Served
from server.web.content_coding import DECODED, UnknownCodingError, decode
from server.web.known_requests import KnownRequest

if TYPE_CHECKING:
    from server.web.connection import Connection

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
X_REQUEST_ID = istr("X-Request-Id")
is_id = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch
"""Matches the ids of clients that are used; any other is replaced by ours."""


class SlowClientError(Exception):
    """The body did not come in time."""


class HttpRequest(web.BaseRequest):
    """One HTTP request, with what the server's layers add to it."""

    client_timeout_s: float
    """How long its client may pause; set by a subclass, since an argument would cost each hit."""

    max_body_bytes: int
    """How large its body may be; set like `client_timeout_s`."""

    draining: Draining
    """Whether its server is about to stop; set like `client_timeout_s`."""

    _protocol: "Connection"
    id: str = ""
    """The `X-Request-Id` of its response: the client's own, if it has sent one, or a new one."""
    body_may_hold_id: bool = False
    """Whether its body may hold another id, which the engine should use."""
    tenant: Tenant = NOBODY
    """The client's tenant; set by the access check."""
    limiter: RateLimiter | None = None
    """Its tenant's limiter, which counts the request as under way; set by the access check."""
    cors_headers: Mapping[str, str] = MappingProxyType({})
    more_headers: Mapping[str, str] = MappingProxyType({})
    """Of its response: those of its tenant's limits, and what a fallback has to say."""

    # As aiohttp's, it is computed once: what is sent says what is done then.
    @reify
    def keep_alive(self) -> bool:
        """Whether its connection stays open after its response."""
        return not (self._message.should_close or self.draining.has_begun)

    @property
    def media_type(self) -> str:
        """The type in its `Content-Type`, in lower case and without parameters."""
        return _media_type(self.headers.get(hdrs.CONTENT_TYPE, ""))

    @property
    def content_coding(self) -> str:
        """The codings of its body (RFC 9110, section 8.4), in lower case; empty if it has none."""
        codings = map(str.lower, self.list_header(hdrs.CONTENT_ENCODING))
        return ", ".join(coding for coding in codings if coding != "identity")

    def list_header(self, name: str) -> list[str]:
        """Return the members of a header that is a list (RFC 9110, section 5.6.1)."""
        members = ",".join(self.headers.getall(name, ())).split(",")
        return [member for member in map(str.strip, members) if member]

    def has_etag(self, etag: str) -> bool:
        """Return whether its client has what an ETag names (RFC 9110, section 13.1.2)."""
        given = ", ".join(self.headers.getall(hdrs.IF_NONE_MATCH, ()))
        return given.strip() == "*" or etag.removeprefix("W/") in given

    def take_id_from_body(self, given: object) -> None:
        """Use the `request_id` of a body as the id, unless a header has one, as vLLM does.

        A value that can't be our id is left to the engine; `None` stands for a body that wasn't
        read.
        """
        if X_REQUEST_ID in self.headers:
            return
        if isinstance(given, str) and is_id(given):
            self.id = given
        else:
            self.body_may_hold_id = True

    async def send_continue(self) -> None:
        """Ask a client for the body that waits for it (RFC 9110, section 10.1.1)."""
        expected = self.headers.get(hdrs.EXPECT, "").lower()
        if expected == "100-continue" and not self.content.is_eof():
            await self.writer.write(CONTINUE)
            # aiohttp must not take this for the beginning of the response.
            self.writer.output_size = 0

    async def read_body(self) -> bytes:
        """Return the whole body, decoded.

        Raises:
            web.HTTPRequestEntityTooLarge: it is larger than `max_body_bytes`.
            web.RequestPayloadError: it violates HTTP.
            BadRequestError: it can't be decoded.
            SlowClientError: it does not arrive in time.
        """
        if hdrs.CONTENT_ENCODING in self.headers and self.content_coding:
            return await self._decoded()
        last = self._protocol.last
        if last is not None and last.payload is self._payload and last.body is not None:
            # It is still in the payload, too, but to read it there would take ten calls.
            body = last.body
        elif self.content.is_eof():
            # `read` would take twice as long.
            body = self.content.read_nowait()
        else:
            try:
                async with asyncio.timeout(self.client_timeout_s):
                    return await self.read()
            except TimeoutError as exc:
                raise SlowClientError from exc
        if len(body) > self.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self.max_body_bytes)
        return body

    async def _decoded(self) -> bytes:
        if (coding := self.content_coding) not in DECODED:
            raise UnknownCodingError(coding)
        body = bytearray()
        try:
            async with asyncio.timeout(self.client_timeout_s):
                async for piece in self.iter_body():
                    body += piece
                    if len(body) > self.max_body_bytes:
                        raise web.HTTPRequestEntityTooLarge(self.max_body_bytes)
        except TimeoutError as exc:
            raise SlowClientError from exc
        return bytes(body)

    def remember(self, body: bytes, request: KnownRequest) -> None:
        """Answer its bytes by `request` when they come again; `body` is its whole body."""
        self._protocol.remember(self, body, request)

    @property
    def is_disconnected(self) -> bool:
        """Whether its connection is closed, or is being closed."""
        return self.transport is None or self.transport.is_closing()

    async def write(self, response: web.StreamResponse | AbstractStreamWriter, data: bytes) -> None:
        """Write to the client as fast as it reads.

        Raises:
            ConnectionResetError: it has disconnected, or has stopped reading.
        """
        try:
            async with asyncio.timeout(self.client_timeout_s):
                await response.write(data)
        except TimeoutError as exc:
            if self.transport is not None:
                # The bytes that it hasn't read would stay in memory.
                self.transport.abort()
            raise ConnectionResetError("the client does not read") from exc

    def iter_body(self) -> AsyncIterator[bytes]:
        """Return the body as it arrives, decoded if its coding is one of `DECODED`.

        Iterating raises what `read_body` does; each piece may take `client_timeout_s`.
        """
        coding = self.content_coding
        return decode(self._received(), coding) if coding in DECODED else self._received()

    async def _received(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self.client_timeout_s):
                    piece = await self.content.readany()
            except TimeoutError as exc:
                raise SlowClientError from exc
            if not piece:
                return
            yield piece


@lru_cache(256)
def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


Reply = tuple[web.StreamResponse, Served]
"""A response, and what was served with it."""
Handler = Callable[[HttpRequest], Awaitable[Reply]]
"""What answers a request."""
Endpoint = Callable[[HttpRequest], Awaitable[web.StreamResponse]]
"""What aiohttp calls: a handler that the middleware wraps, or one that needs no middleware."""


class Traced(Protocol):
    """Returns an endpoint that has a span for each request, if requests are traced."""

    def __call__(self, endpoint: Endpoint, route: str | None = None, /) -> Endpoint:
        """Take an endpoint, and the path of its route if it has only one."""
