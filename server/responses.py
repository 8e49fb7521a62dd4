"""What responses have in common: headers of ours, and errors in OpenAI's shape.

Errors follow vLLM's conventions: `code` is the HTTP status.
"""

from http import HTTPStatus

import orjson
from aiohttp import web

SERVER = "tierserve"
RETRY_AFTER_S = 5


def own_headers(http: web.Request) -> dict[str, str]:
    """Return the headers that each response carries."""
    return {"Server": SERVER, "X-Request-Id": http["id"]}


def error_body(status: int, message: str, *, param: str | None = None) -> bytes:
    """Return the JSON body of an error."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "") + "Error"
    error = {"message": message, "type": kind, "param": param, "code": status}
    return orjson.dumps({"error": error})


def error_response(
    status: int, message: str, *, param: str | None = None, retry_after_s: int | None = None
) -> web.Response:
    """Return an error as a response."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return web.Response(
        status=status,
        body=error_body(status, message, param=param),
        content_type="application/json",
        headers=headers,
    )


def failure(exc: Exception) -> web.Response:
    """Return what a client gets whose engine failed with `exc`."""
    if isinstance(exc, TimeoutError):
        return error_response(504, "The engine did not answer in time.")
    return error_response(502, "The engine ended before its answer was complete.")


def unavailable() -> web.Response:
    """Return what a miss gets while no engine answers."""
    return error_response(
        503, "The engine is starting or down; try again.", retry_after_s=RETRY_AFTER_S
    )
