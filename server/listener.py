"""The listening socket, and HTTP that can't be understood."""

import asyncio
import logging
from functools import partial
from typing import Any

from aiohttp import web

from server.http_request import Handler, HttpRequest
from server.responses import SERVER, error_response

logger = logging.getLogger(__name__)

_BACKLOG = 1024


class _Protocol(web.RequestHandler):
    """aiohttp's HTTP/1.1 protocol, whose own errors are in OpenAI's shape."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        logger.info("a request could not be read: %s", exc or message)
        response = error_response(status, "The request is not valid HTTP.")
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def log_exception(self, *args: Any, **more: Any) -> None:
        # A body that can't be decoded has been answered, and is no failure of ours.
        if not isinstance(more.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **more)


def make_server(handler: Handler, max_body_bytes: int) -> web.Server:
    """Return aiohttp's server around one handler; its `Application` would double its cost."""
    loop = asyncio.get_running_loop()
    make_request = partial(HttpRequest, loop=loop, client_max_size=max_body_bytes)
    # The handler is given what the factory makes, which aiohttp's types don't say.
    return web.Server(handler, request_factory=make_request, handler_cancellation=True)  # type: ignore[arg-type]


async def listen(server: web.Server, host: str, port: int) -> asyncio.Server:
    """Accept connections for `server`.

    Raises:
        OSError: the address can't be had.
    """
    loop = asyncio.get_running_loop()

    def protocol() -> _Protocol:
        # None turns aiohttp's own access log off, which its type doesn't say.
        return _Protocol(server, loop=loop, access_log=None)  # type: ignore[arg-type]

    return await loop.create_server(protocol, host, port, backlog=_BACKLOG)
