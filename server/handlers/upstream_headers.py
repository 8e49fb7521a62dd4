"""The headers of requests that go on to engines.

Of a request whose answer is to be kept only three kinds do: credentials, which keep answers apart
already (`server.auth.tenants`); those that are part of its key, unless a vLLM answers, which doesn't
read them; and those that change no answer. Others, such as cookies or languages, might change the
answer without being in its key. vLLM may refuse some values of the headers that say where and when
it works; a hit doesn't depend on them.
"""

from multidict import CIMultiDict, MultiMapping, istr

from server.handlers.forwarding import KEYED, forwarded
from server.protocol.cache_control import Control
from server.web.request import HttpRequest

LOAD_FORMAT = istr("Endpoint-Load-Metrics-Format")
LOAD = istr("Endpoint-Load-Metrics")
"""An engine's report of its load (ORCA), in the format that a load balancer asks for."""
_GO_ON = frozenset(map(str.lower, KEYED)) | {
    "accept-encoding", "authorization", "cache-control", "content-type", "traceparent",
    "tracestate", "user-agent", "x-api-key", "x-request-id",
    LOAD_FORMAT.lower(),
    # vLLM's own, which say where and when it works.
    "x-data-parallel-rank", "x-session-id", "x-vllm-priority",
}  # fmt: skip


def keyed(headers: MultiMapping[str]) -> tuple[tuple[str, str], ...]:
    """Return which of the headers are part of a key, with their values."""
    said: tuple[tuple[str, str], ...] = ()
    for name in KEYED:
        if name in headers:
            # Whether an engine joins several, or takes the first, we don't know.
            said += tuple((name, value) for value in headers.getall(name))
    return said


def of_what_is_kept(http: HttpRequest, also: Control) -> CIMultiDict[str]:
    """Return the headers with which an engine is asked for an answer that is to be kept.

    `also` is said to caches on the way, such as another tierserve.
    """
    headers = forwarded(http)
    for name in {name for name in headers if name.lower() not in _GO_ON}:
        headers.popall(name)
    return saying(headers, also)


def saying(headers: CIMultiDict[str], also: Control) -> CIMultiDict[str]:
    """Return the headers, and what `also` says without times."""
    for directive in also.directives:
        headers.add("Cache-Control", directive)
    return headers
