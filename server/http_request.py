"""A request as it came in: aiohttp's, with its id and what became of it."""

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web


class HttpRequest(web.BaseRequest):
    """One HTTP request."""

    id: str = ""
    """The `X-Request-Id` of its response."""
    outcome: tuple[str, str] = ("none", "own")
    """Which tier answered, and how."""

    async def invite_body(self) -> None:
        """Have a client go on that waits to be told so (RFC 9110, section 10.1.1)."""
        if self.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # The response itself has not begun.
            self.writer.output_size = 0

    async def body(self) -> bytes:
        """Return all of the body.

        Raises:
            web.HTTPRequestEntityTooLarge: it is larger than `client_max_size`.
            web.RequestPayloadError: it can't be decoded.
        """
        if not self.content.is_eof():
            return await self.read()
        # Most bodies are there when their handler starts: `read` would take twice as long.
        body = self.content.read_nowait()
        if len(body) > self.client_max_size:
            raise web.HTTPRequestEntityTooLarge(self.client_max_size)
        return body


Handler = Callable[[HttpRequest], Awaitable[web.StreamResponse]]
"""What answers a request."""
