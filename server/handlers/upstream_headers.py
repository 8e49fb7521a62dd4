"""The headers of requests that go on to engines.

Of a request whose answer is to be kept only three kinds do: credentials, which keep answers apart
already (`server.auth.tenants`); those that are part of its key, unless a vLLM answers, which
doesn't read them; and those that change no answer. Others, such as cookies or languages, might
change the answer without being in its key. vLLM may refuse some values of the headers that say
where and when it works; a hit doesn't depend on them.
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
_GO_ON = frozenset(map(str.lower, KEY_HEADERS)) | {
    "accept-encoding", "authorization", "cache-control", "content-type", "traceparent",
    "tracestate", "user-agent", "x-api-key", "x-request-id",
    LOAD_FORMAT.lower(),
    # vLLM's own, which say where and when it works.
    "x-data-parallel-rank", "x-session-id", "x-vllm-priority",
}  # fmt: skip


def cacheable_request_headers(http: HttpRequest, also: CacheControl) -> CIMultiDict[str]:
    """Return the headers with which an engine is asked for an answer that is to be kept.

    `also` is said to caches on the way, such as another tierserve.
    """
    headers = forwarded_headers(http)
    for name in {name for name in headers if name.lower() not in _GO_ON}:
        headers.popall(name)
    return with_cache_control(headers, also)


def with_cache_control(headers: CIMultiDict[str], also: CacheControl) -> CIMultiDict[str]:
    """Return the headers, and what `also` says without times."""
    for directive in also.directives:
        headers.add("Cache-Control", directive)
    return headers


# Of one connection only (RFC 9110, section 7.6.1), or set anew by us.
_OURS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "server", "te", "trailer", "transfer-encoding", "upgrade",
        "x-request-id",
    }
)  # fmt: skip


# Which of us a client is, no engine has to know.
_KEYS = frozenset({"authorization", "x-api-key"})


# An answer belongs to whom these name, so no `Connection` keeps them from its engine.
_END_TO_END = _KEYS | frozenset(map(str.lower, KEY_HEADERS))


UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Has nginx, and those that heed the same, pass a stream on as it comes."""


def forwarded_headers(http: HttpRequest) -> CIMultiDict[str]:
    """Return the headers with which a request goes on to an engine."""
    hop = {name.lower() for name in http.list_header("Connection")} - _END_TO_END
    keys = _KEYS if http.tenant.has_key else frozenset()
    undone = {"content-encoding"} if http.content_coding in DECODED else frozenset()
    headers = _without(http.headers, _OURS | keys | hop | undone)
    # We must be able to read what comes back.
    headers["Accept-Encoding"] = "identity"
    if not http.body_may_hold_id:
        # An engine takes this one before that of a body.
        headers["X-Request-Id"] = http.id
    return headers


def returned_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers with which an engine's reply goes back to the client."""
    # Which pages may ask us is not an engine's to say (`server.web.cors`).
    sharing = {name for name in map(str.lower, headers) if name.startswith("access-control-")}
    return _without(headers, _OURS | sharing)


def _without(headers: Mapping[str, str], names: Collection[str]) -> CIMultiDict[str]:
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in names
    )
