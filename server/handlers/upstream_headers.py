"""The headers of requests that are forwarded to engines, and of their replies.

A request whose answer is to be kept forwards three kinds only: credentials, which keep answers of
tenants apart (`server.auth.tenants`); headers that are part of its key (a vLLM's key has none,
since it reads none); and headers that change no answer. Others, such as cookies or languages,
might change the answer without being in its key. vLLM may refuse some values of the headers that
control where and when it runs a request; a hit doesn't depend on them.
"""

from collections.abc import Collection, Mapping

from multidict import CIMultiDict, istr

from server.protocol.cache_control import CacheControl
from server.protocol.request import KEY_HEADERS
from server.web.content_coding import DECODED
from server.web.request import HttpRequest

LOAD_FORMAT = istr("Endpoint-Load-Metrics-Format")
LOAD = istr("Endpoint-Load-Metrics")
"""An engine's report of its load (ORCA), in the format that a load balancer asks for."""
FALLBACK = istr("X-Tierserve-Fallback")
"""Names the model that has answered in place of the one that was asked for."""
_FORWARDED_OF_CACHEABLE = frozenset(map(str.lower, KEY_HEADERS)) | {
    "accept-encoding", "authorization", "cache-control", "content-type", "traceparent",
    "tracestate", "user-agent", "x-api-key", "x-request-id",
    LOAD_FORMAT.lower(),
    # vLLM's own, which control where and when it runs a request.
    "x-data-parallel-rank", "x-session-id", "x-vllm-priority",
}  # fmt: skip


def cacheable_request_headers(http: HttpRequest) -> CIMultiDict[str]:
    """Return the headers of an engine's request whose answer is to be kept."""
    headers = forwarded_headers(http)
    for name in {name for name in headers if name.lower() not in _FORWARDED_OF_CACHEABLE}:
        headers.popall(name)
    return headers


def with_cache_control(headers: CIMultiDict[str], control: CacheControl) -> CIMultiDict[str]:
    """Add the directives of `control`, without its times, and return the headers.

    They are for caches on the way, such as another tierserve.
    """
    for directive in control.directives:
        headers.add("Cache-Control", directive)
    return headers


# Of one connection only (RFC 9110, section 7.6.1), or set by us.
_NOT_FORWARDED = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "server", "te", "trailer", "transfer-encoding", "upgrade",
        "x-request-id",
    }
)  # fmt: skip
# An engine doesn't need a tenant's key.
_CREDENTIALS = frozenset({"authorization", "x-api-key"})
# These decide whose an answer is, or its key, so a `Connection` header can't remove them.
_END_TO_END = _CREDENTIALS | frozenset(map(str.lower, KEY_HEADERS))


UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Makes nginx, and proxies that know its header, forward a stream without buffering."""


def fallback_headers(model: str) -> Mapping[str, str]:
    """Return the headers of an answer by another model than the one that was asked for."""
    # No cache on the way to the client takes it for that one's answer.
    return {FALLBACK: model, "Cache-Control": "no-store"}


def forwarded_headers(http: HttpRequest) -> CIMultiDict[str]:
    """Return the headers of a request that is forwarded to an engine."""
    hop = {name.lower() for name in http.list_header("Connection")} - _END_TO_END
    keys = _CREDENTIALS if http.tenant.has_key else frozenset()
    decoded = {"content-encoding"} if http.content_coding in DECODED else frozenset()
    headers = _without(http.headers, _NOT_FORWARDED | keys | hop | decoded)
    # We must be able to read the reply.
    headers["Accept-Encoding"] = "identity"
    if not http.body_may_hold_id:
        # An engine prefers this id to one in the body.
        headers["X-Request-Id"] = http.id
    return headers


def returned_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers of an engine's reply that are returned to the client."""
    # The server alone decides about CORS (`server.web.cors`).
    cors = {name for name in map(str.lower, headers) if name.startswith("access-control-")}
    return _without(headers, _NOT_FORWARDED | cors)


def _without(headers: Mapping[str, str], names: Collection[str]) -> CIMultiDict[str]:
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in names
    )
