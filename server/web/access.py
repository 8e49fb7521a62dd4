"""The door: whose request it is, and whether it may come in.

Its methods are given a request and return why it may not, as a response, or `None` if it may; they
are for `server.middleware.wrap`.
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
    """The door of all routes that answer requests.

    Args:
        tenants: who may come in.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self.unauthorized = 0
        """Requests without a key that is known."""

    def require_tenant(self, http: HttpRequest) -> web.Response | None:
        """Let in whoever has a key, within the tenant's limits."""
        if (refused := self.identify_tenant(http)) is not None:
            return refused
        account = http.tenant.limiter
        if account is None:
            return None
        refusal = account.acquire()
        if headers := account.headers:
            http.response_headers = {**http.response_headers, **headers}
        if refusal is None:
            http.limiter = account
            return None
        http.outcome = ("none", "refused")
        return error_response(
            429,
            refusal.text,
            kind="requests",
            code="rate_limit_exceeded",
            retry_after_s=refusal.retry_after_s,
        )

    def identify_tenant(self, http: HttpRequest) -> web.Response | None:
        """Let in whoever has a key, without counting it: for what costs no engine anything."""
        tenant = self._tenants.find(http.headers)
        if tenant is None:
            self.unauthorized += 1
            return unauthorized(http)
        http.tenant = tenant
        return None

    def require_operator(self, http: HttpRequest) -> web.Response | None:
        """Let in whoever has an operator's key."""
        return self.require_tenant(http) or (None if http.tenant.operator else _forbidden())

    def for_engine_path(self, path: str) -> AccessCheck:
        """Return what lets in whoever may ask an engine for `path`."""
        return self.require_tenant if is_tenant_allowed(path) else self.require_operator

    def for_request_path(self, http: HttpRequest) -> web.Response | None:
        """Let in whoever may ask an engine for the request's path."""
        return self.for_engine_path(http.path)(http)


def allow_anyone(_: HttpRequest) -> None:
    """Let anybody in."""


def require_key(key_hash: str) -> AccessCheck:
    """Return what lets in whoever has the key with this hash."""

    def enter(http: HttpRequest) -> web.Response | None:
        key = bearer_key(presented_credentials(http.headers))
        # Whoever has hashed an empty variable has let nobody in.
        is_known = bool(key) and compare_digest(hash_key(key), key_hash)
        return None if is_known else unauthorized(http)

    return enter


def unauthorized(http: HttpRequest) -> web.Response:
    """Return what a request without a key that is known gets, which doesn't repeat the key."""
    http.outcome = ("none", "refused")
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
