"""Which pages of other sites may ask us: cross-origin resource sharing (Fetch, section 3.2).

The front alone decides it, and for every response alike, since a tier doesn't know what an engine
would allow; what engines say about it goes to no client (`server.handlers.forwarding`).
Pages send keys as headers of their own; cookies and the like, which browsers send unasked, are
never allowed.
"""

from collections.abc import Awaitable, Collection

from aiohttp import hdrs, web

from server.web.request import Endpoint, HttpRequest

ANY = "*"
# As long as any browser remembers it.
_REMEMBERED_S = 86400
_BY_ORIGIN = {"Vary": "Origin"}
_EXPOSED = {"Access-Control-Expose-Headers": "*"}


def with_cors(origins: Collection[str], endpoint: Endpoint, preflight: Endpoint) -> Endpoint:
    """Return `endpoint` for pages of these origins, too, whose preflights `preflight` answers."""
    of_others: dict[str, str] = _BY_ORIGIN
    by_origin: dict[str, dict[str, str]] = {}
    if ANY in origins:
        of_others = _EXPOSED | {"Access-Control-Allow-Origin": ANY}
    else:
        for origin in origins:
            by_origin[origin] = _EXPOSED | _BY_ORIGIN | {"Access-Control-Allow-Origin": origin}

    def answer(http: HttpRequest) -> Awaitable[web.StreamResponse]:
        http.response_headers = by_origin.get(http.headers.get(hdrs.ORIGIN, ""), of_others)
        is_preflight = (
            http.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in http.headers
        )
        if is_preflight and hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in http.response_headers:
            return preflight(http)
        return endpoint(http)

    return answer if origins else endpoint


async def answer_preflight(http: HttpRequest) -> web.Response:
    """Allow a page what it asks for; whether it has a key is known when it sends that."""
    asked = http.headers
    headers = {
        "Access-Control-Allow-Methods": asked[hdrs.ACCESS_CONTROL_REQUEST_METHOD],
        "Access-Control-Allow-Headers": asked.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, ""),
        "Access-Control-Max-Age": str(_REMEMBERED_S),
    }
    return web.Response(status=204, headers=headers)
