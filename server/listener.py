"""The listening socket, and HTTP that can't be understood."""

import asyncio
import logging
from typing import Any

from aiohttp import web

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
