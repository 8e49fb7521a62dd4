"""A resource that seldom changes, sent with an ETag and revalidated by it (RFC 9110)."""

from hashlib import blake2b

from aiohttp import hdrs, web

from server.web.request import HttpRequest


class ETagResource:
    """A body with its content type and ETag.

    Args:
        body: the whole body.
        content_type: with its charset.
        headers: further headers of its responses.
    """

    def __init__(
        self, body: bytes, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        self._body = body
        self._etag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
        # Browsers revalidate at each use, so that no old script meets a new server.
        self._headers = (headers or {}) | {
            hdrs.ETAG: self._etag,
            hdrs.CACHE_CONTROL: "no-cache",
            hdrs.CONTENT_TYPE: content_type,
            "X-Content-Type-Options": "nosniff",
        }

    def response(self, http: HttpRequest) -> web.Response:
        """Return a response with the body, or a 304 if the request names its ETag."""
        if http.has_etag(self._etag):
            headers = {n: v for n, v in self._headers.items() if n != hdrs.CONTENT_TYPE}
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._body, headers=self._headers)
