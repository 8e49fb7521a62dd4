"""Wraps every handler: gives the request an id, checks access, answers errors, and records it.

Handlers are wrapped when their routes are made: aiohttp's own middlewares would cost each hit two
more coroutines.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Iterator

from aiohttp import hdrs, web

from server.auth.credentials import DuplicateHeaderError
from server.protocol.errors import BadRequestError
from server.telemetry.finished import CLIENT_GONE, FinishedRequests
from server.telemetry.served import OWN, REFUSED, attached
from server.web.access import AccessCheck
from server.web.content_coding import UnknownCodingError
from server.web.request import (
    X_REQUEST_ID,
    Endpoint,
    Handler,
    HttpRequest,
    Reply,
    SlowClientError,
    is_id,
)
from server.web.responses import ErrorResponse, error_response, server_headers

logger = logging.getLogger(__name__)

_MISTAKES = (
    BadRequestError,
    DuplicateHeaderError,
    SlowClientError,
    web.HTTPRequestEntityTooLarge,
    web.RequestPayloadError,
)
"""Mistakes of clients, which are answered with a status of 400 to 499."""


class Middleware:
    """Wraps handlers, which makes endpoints of them.

    Args:
        finished: is given every request that has ended.
        ids: yields ids for requests that have none.
    """

    def __init__(self, finished: FinishedRequests, ids: Iterator[str]) -> None:
        self._finished, self._ids = finished, ids

    def wrap(self, handler: Handler, check: AccessCheck) -> Endpoint:
        """Return the endpoint of a handler.

        A response that the handler prepares itself needs `server_headers`. What `check` returns,
        unless it is `None`, is the response instead of the handler's.
        """
        ids, finished = self._ids, self._finished.add

        async def endpoint(http: HttpRequest) -> web.StreamResponse:
            given = http.headers.get(X_REQUEST_ID)
            http.id = given if given and is_id(given) else next(ids)
            started = time.perf_counter()
            status, served = CLIENT_GONE, OWN
            try:
                if (refused := check(http)) is None:
                    if hdrs.EXPECT in http.headers:
                        await http.send_continue()
                    response, served = await handler(http)
                else:
                    response, served = refused, REFUSED
                status = response.status
            except _MISTAKES as exc:
                response, served = _mistake(exc), attached(exc)
                status = response.status
            except (ConnectionError, asyncio.CancelledError) as exc:
                served = attached(exc)
                raise
            except Exception as exc:
                logger.exception("a request failed", extra={"request_id": http.id})
                response, served = error_response(500, "Internal error."), attached(exc)
                status = 500
            finally:
                tenant = None
                if http.limiter is not None:
                    http.limiter.release()
                    tenant = http.tenant.name
                seconds = time.perf_counter() - started
                finished(http.method, http.path, http.id, tenant, status, seconds, served)
            return response if response.prepared else _with_server_headers(http, response)

        return endpoint


def read_only(handler: Handler) -> Handler:
    """Return `handler` for GET and HEAD alone."""

    async def read(http: HttpRequest) -> Reply:
        if http.method in ("GET", "HEAD"):
            return await handler(http)
        refused = error_response(405, "The method should be GET or HEAD.")
        refused.headers["Allow"] = "GET, HEAD"
        return refused, OWN

    return read


def own(endpoint: Endpoint) -> Handler:
    """Return the handler of an endpoint that needs neither tiers nor engines."""

    async def handler(http: HttpRequest) -> Reply:
        return await endpoint(http), OWN

    return handler


def _with_server_headers(http: HttpRequest, response: web.StreamResponse) -> web.StreamResponse:
    if isinstance(response, ErrorResponse):
        response.in_dialect_of(http.path)
    response.headers.update(server_headers(http))
    return response


def _mistake(exc: Exception) -> web.Response:
    """Return the response to one of `_MISTAKES`."""
    if isinstance(exc, BadRequestError):
        response = error_response(exc.status, str(exc), param=exc.param)
        if isinstance(exc, UnknownCodingError):
            response.headers["Accept-Encoding"] = "gzip, deflate"
        return response
    if isinstance(exc, DuplicateHeaderError):
        return error_response(400, str(exc), param=exc.header)
    if isinstance(exc, web.HTTPRequestEntityTooLarge):
        return error_response(413, "The body is larger than server.max_body_bytes allows.")
    if isinstance(exc, SlowClientError):
        response = error_response(408, "The body did not come within server.client_timeout_s.")
    else:
        response = error_response(400, "The body is not valid HTTP.")
    response.force_close()
    return response


def request_ids() -> Iterator[str]:
    """Yield ids that no other process gives: counted, since `uuid4` costs a system call."""
    start, ends = secrets.token_hex(12), [f"{number:02x}" for number in range(256)]
    for number in itertools.count():
        # Formatting each number would cost a hit more than the rest of its id.
        id_ = f"{start}{number:06x}"
        for end in ends:
            yield id_ + end
