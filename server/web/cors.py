"""Cross-origin resource sharing: which other sites' pages may use the server (Fetch, section 3.2).

The configuration alone decides it, for every response alike, since a tier doesn't know what an
engine would allow. Engines' CORS headers are dropped (`server.handlers.upstream_headers`). Pages
send keys in headers. Cookies and other credentials that browsers send by themselves are never
allowed.
"""

from collections.abc import Awaitable, Collection

from aiohttp import hdrs, web

from server.web.request import Endpoint, HttpRequest

ANY = "*"
# The longest time for which browsers cache a preflight's response.
_MAX_AGE_S = 86400
_BY_ORIGIN = {"Vary": "Origin"}
_EXPOSED = {"Access-Control-Expose-Headers": "*"}


def with_cors(origins: Collection[str], endpoint: Endpoint, preflight: Endpoint) -> Endpoint:
    """Return `endpoint` with CORS for these origins; `preflight` answers their preflights."""
    for_others: dict[str, str] = _BY_ORIGIN
    by_origin: dict[str, dict[str, str]] = {}
    if ANY in origins:
        for_others = _EXPOSED | {"Access-Control-Allow-Origin": ANY}
    else:
        for origin in origins:
            by_origin[origin] = _EXPOSED | _BY_ORIGIN | {"Access-Control-Allow-Origin": origin}

    def answer(http: HttpRequest) -> Awaitable[web.StreamResponse]:
        http.cors_headers = by_origin.get(http.headers.get(hdrs.ORIGIN, ""), for_others)
        is_preflight = (
            http.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in http.headers
        )
        if is_preflight and hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in http.cors_headers:
            return preflight(http)
        return endpoint(http)

    return answer if origins else endpoint


async def answer_preflight(http: HttpRequest) -> web.Response:
    """Allow the method and headers that a page asks for; its key is checked with the request."""
    requested = http.headers
    headers = {
        "Access-Control-Allow-Methods": requested[hdrs.ACCESS_CONTROL_REQUEST_METHOD],
        "Access-Control-Allow-Headers": requested.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, ""),
        "Access-Control-Max-Age": str(_MAX_AGE_S),
    }
    return web.Response(status=204, headers=headers)
