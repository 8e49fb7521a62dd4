"""What surrounds every handler: request id, last-resort errors, metrics, access log.

Wraps handlers when their routes are added: aiohttp's own middlewares would cost each hit two more
coroutines.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterator

from aiohttp import web

from server.auth.credentials import DuplicateHeaderError
from server.config.base import SERVER
from server.protocol.errors import BadRequestError
from server.protocol.usage import output_tokens
from server.telemetry.history import History
from server.telemetry.logs import AccessLog
from server.telemetry.metrics import Metrics
from server.telemetry.trace_log import TraceLog
from server.web.content_coding import UnknownCodingError
from server.web.request import X_REQUEST_ID, Handler, HttpRequest, SlowClientError, is_id
from server.web.responses import ErrorResponse, error_response

logger = logging.getLogger(__name__)

# As nginx logs it; nobody receives it.
_CLIENT_GONE = 499
# Of requests whose answer a tier gave, or would have given if it had had it.
_LOOKED_UP = frozenset({"collapsed", "hit", "miss", "stale"})
_ENGINE = "engine"
_MISTAKES = (
    BadRequestError,
    DuplicateHeaderError,
    SlowClientError,
    web.HTTPRequestEntityTooLarge,
    web.RequestPayloadError,
)


def wrap(
    handler: Handler,
    metrics: Metrics,
    history: History,
    access: AccessLog,
    trace: TraceLog | None = None,
    *,
    enter: Callable[[HttpRequest], web.Response | None],
) -> Handler:
    """Return `handler` with its surroundings.

    A response that it prepares itself needs `server_headers`. What `enter` returns, unless it is
    `None`, is the response without asking the handler.
    """
    ids = _request_ids()

    async def around(http: HttpRequest) -> web.StreamResponse:
        given = http.headers.get(X_REQUEST_ID)
        http.id = given if given and is_id(given) else next(ids)
        started = time.perf_counter()
        status = _CLIENT_GONE
        try:
            refused = enter(http)
            if refused is None:
                if not http.content.is_eof():
                    await http.send_continue()
                response = await handler(http)
            else:
                response = refused
            status = response.status
        except _MISTAKES as exc:
            response = _said(exc)
            status = response.status
        except ConnectionError:
            raise
        except Exception:
            logger.exception("a request failed", extra={"request_id": http.id})
            response = error_response(500, "Internal error.")
            status = 500
        finally:
            _note(http, status, time.perf_counter() - started, metrics, history, access, trace)
        if not response.prepared:
            if isinstance(response, ErrorResponse):
                response.in_dialect_of(http.path)
            headers = response.headers
            headers["Server"], headers["X-Request-Id"] = SERVER, http.id
            if http.response_headers:
                headers.update(http.response_headers)
        return response

    return around


def read_only(handler: Handler) -> Handler:
    """Return `handler` for GET and HEAD alone."""

    async def read(http: HttpRequest) -> web.StreamResponse:
        if http.method in ("GET", "HEAD"):
            return await handler(http)
        refused = error_response(405, "The method should be GET or HEAD.")
        refused.headers["Allow"] = "GET, HEAD"
        return refused

    return read


def _said(exc: Exception) -> web.Response:
    """Return what a client gets that has made one of `_MISTAKES`."""
    if isinstance(exc, BadRequestError):
        refused = error_response(exc.status, str(exc), param=exc.param)
        if isinstance(exc, UnknownCodingError):
            refused.headers["Accept-Encoding"] = "gzip, deflate"
        return refused
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


def _note(
    http: HttpRequest,
    status: int,
    seconds: float,
    metrics: Metrics,
    history: History,
    access: AccessLog,
    trace: TraceLog | None,
) -> None:
    """Count a request that has ended, and have it written down."""
    account = http.limiter
    if account is not None:
        account.release()
    tier, outcome = http.outcome
    if status == _CLIENT_GONE and outcome != "error":
        outcome = "aborted"
    tokens = 0 if http.found is None else output_tokens(http.found[1]) or 0
    metrics.observe(http.model, tier, outcome, seconds, tokens, http.saved_s)
    at = time.time()
    if outcome in _LOOKED_UP:
        saved = 0 if tier == _ENGINE else tokens
        history.add(at, tier, saved, http.saved_s)
        if account is not None:
            account.history.add(at, tier, saved, http.saved_s)
    access.add(at, http.method, http.path, status, http.id, tier, outcome, seconds)
    if trace is not None and http.found is not None:
        request, answer = http.found
        trace.add(at, request.key, request.model, answer, (tier, outcome))


def _request_ids() -> Iterator[str]:
    """Yield ids that no other process gives: counted, since `uuid4` costs a system call."""
    start, ends = secrets.token_hex(12), [f"{number:02x}" for number in range(256)]
    for number in itertools.count():
        # Each number would cost a hit more to write than all else of its id.
        id_ = f"{start}{number:06x}"
        for end in ends:
            yield id_ + end
