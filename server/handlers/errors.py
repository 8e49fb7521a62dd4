"""The responses of requests whose engine fails or is unavailable."""

from server.engine.upstream import UnavailableError
from server.web.responses import RETRY_AFTER_S, ErrorResponse, error_response


def failure(exc: Exception) -> ErrorResponse:
    """Return the response where the engine failed with `exc`."""
    if isinstance(exc, TimeoutError):
        return error_response(504, "The engine did not answer in time.")
    return error_response(502, "The engine ended before its answer was complete.")


def unavailable(exc: UnavailableError) -> ErrorResponse:
    """Return the response where no engine takes the request."""
    return error_response(503, str(exc), retry_after_s=RETRY_AFTER_S)
