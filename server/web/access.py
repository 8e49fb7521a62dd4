"""Access control: which tenant a request is of, and whether it is allowed.

An access check is given a request, notes its tenant on it, and returns the response that refuses
it, or `None` if it is allowed. `server.web.middleware` calls it before the handler.
"""

from collections.abc import Callable
from hmac import compare_digest

from aiohttp import web

from server.auth.credentials import bearer_key, presented_credentials
from server.auth.tenants import Tenants
from server.config.secrets import hash_key
from server.protocol.routes import is_tenant_allowed
from server.web.request import HttpRequest
from server.web.responses import error_response

AccessCheck = Callable[[HttpRequest], web.Response | None]


class AccessControl:
    """The access checks of all routes.

    Args:
        tenants: who is allowed.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self.unauthorized = 0
        """How many requests had no valid key."""

    def require_tenant(self, http: HttpRequest) -> web.Response | None:
        """Allow a tenant within its rate limits."""
        if (refused := self.identify_tenant(http)) is not None:
            return refused
        limiter = http.tenant.limiter
        if limiter is None:
            return None
        limited = limiter.acquire()
        if headers := limiter.headers:
            http.response_headers = {**http.response_headers, **headers}
        if limited is None:
            http.limiter = limiter
            return None
        return error_response(
            429,
            limited.text,
            kind="requests",
            code="rate_limit_exceeded",
            retry_after_s=limited.retry_after_s,
        )

    def identify_tenant(self, http: HttpRequest) -> web.Response | None:
        """Allow any tenant without counting the request, for routes that cost no engine time."""
        tenant = self._tenants.find(http.headers)
        if tenant is None:
            self.unauthorized += 1
            return unauthorized(http)
        http.tenant = tenant
        return None

    def require_operator(self, http: HttpRequest) -> web.Response | None:
        """Allow operators, within their rate limits."""
        return self.require_tenant(http) or (None if http.tenant.operator else _forbidden())

    def for_engine_path(self, path: str) -> AccessCheck:
        """Return the check for requests that ask an engine for `path`."""
        return self.require_tenant if is_tenant_allowed(path) else self.require_operator

    def for_request_path(self, http: HttpRequest) -> web.Response | None:
        """Allow tenants that may request this path of an engine."""
        return self.for_engine_path(http.path)(http)


def allow_anyone(_: HttpRequest) -> None:
    """Allow every request."""


def require_key(key_hash: str) -> AccessCheck:
    """Return the check that allows the key with this hash, and no other."""

    def check(http: HttpRequest) -> web.Response | None:
        key = bearer_key(presented_credentials(http.headers))
        # An empty key never authenticates, also where an empty text was hashed by mistake.
        is_valid = bool(key) and compare_digest(hash_key(key), key_hash)
        return None if is_valid else unauthorized(http)

    return check


def unauthorized(http: HttpRequest) -> web.Response:
    """Return the response to a request without a valid key; it doesn't repeat the key."""
    if presented_credentials(http.headers):
        text = "Incorrect API key provided."
    else:
        text = (
            "You didn't provide an API key. You need to provide your API key in an Authorization "
            "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    refused = error_response(401, text, kind="invalid_request_error", code="invalid_api_key")
    refused.headers["WWW-Authenticate"] = "Bearer"
    return refused


def _forbidden() -> web.Response:
    text = "This key does not allow that; it takes an operator's."
    return error_response(403, text, kind="invalid_request_error", code="insufficient_permissions")
