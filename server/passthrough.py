"""Passing a request through to an engine and its reply back, unchanged and without buffering."""

import aiohttp
from aiohttp import web

from server.responses import error_response, own_headers, unavailable
from server.upstream import UnavailableError, Upstreams

# Of one connection only (RFC 9110, section 7.6.1), or set anew by us.
_OURS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "server", "te", "trailer", "transfer-encoding", "upgrade",
        "x-request-id",
    }
)  # fmt: skip


def forwarded(http: web.Request) -> dict[str, str]:
    """Return the headers with which a request goes on to an engine."""
    headers = {name: value for name, value in http.headers.items() if name.lower() not in _OURS}
    return headers | {"X-Request-Id": http["id"]}


async def forward(
    http: web.Request,
    upstreams: Upstreams,
    *,
    body: bytes | None = None,
    path: str | None = None,
    cache_status: str | None = None,
) -> web.StreamResponse:
    """Pass `http` to an upstream.

    Args:
        http: the client's request.
        upstreams: one of them is asked.
        body: the request's body where it has been read already.
        path: asked instead of the request's own.
        cache_status: added to the reply (RFC 9211).
    """
    http["outcome"] = ("engine", "pass")
    data = body if body is not None else (http.content if http.body_exists else None)
    response: web.StreamResponse | None = None
    try:
        async with upstreams.request(
            http.method, path or http.raw_path, data=data, headers=forwarded(http)
        ) as reply:
            response = web.StreamResponse(status=reply.status, headers=own_headers(http))
            for name, value in reply.headers.items():
                if name.lower() not in _OURS:
                    response.headers.add(name, value)
            if reply.content_length is not None and http.method != "HEAD":
                response.content_length = reply.content_length
            if cache_status is not None:
                response.headers["Cache-Status"] = cache_status
            await response.prepare(http)
            async for piece in reply.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response
    except UnavailableError:
        return unavailable()
    except (aiohttp.ClientError, OSError) as exc:
        http["outcome"] = ("engine", "error")
        if response is not None:
            # What has begun can only be cut, so that the client sees that it isn't whole.
            raise ConnectionResetError from exc
        if isinstance(exc, TimeoutError):
            return error_response(504, "The engine did not answer in time.")
        return error_response(502, "The engine ended before its answer was complete.")
