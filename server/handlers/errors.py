"""What clients get whose engine fails or can't be had."""

from server.engine.upstream import UnavailableError
from server.web.responses import RETRY_AFTER_S, ErrorResponse, error_response


def failure(exc: Exception) -> ErrorResponse:
    """Return what a client gets whose engine failed with `exc`."""
    if isinstance(exc, TimeoutError):
        return error_response(504, "The engine did not answer in time.")
    return error_response(502, "The engine ended before its answer was complete.")


def unavailable(exc: UnavailableError) -> ErrorResponse:
    """Return what a miss gets that no engine takes."""
    return error_response(503, str(exc), retry_after_s=RETRY_AFTER_S)
